/* System calls on many small files in one call: what Python calls one by one, with the interpreter let go once.
 *
 * A plain library without Python's headers, loaded by flowengine/store/many.py, which says what each function is for
 * and does the same without it. Names come and go as bytes with NUL behind each; numbers as int64.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "proofs are little-endian; Python does without this library"
#endif

#define INTERFACE 11
#define KINDS 4
enum { SMALL, LARGE, FOLDER, OTHER };

typedef struct {
    int64_t ino, size, mtime_ns, ctime_ns, mode; /* the first five prove that an entry is unchanged */
    int64_t nlink, blocks, dev, uid, gid;
} Row;

typedef struct {
    const char *name; /* in `Found.names`; an offset until that has its last size */
    size_t length;
    Row row;
} Item;

typedef struct {
    int64_t count[KINDS], name_bytes[KINDS];
    int64_t linked; /* small regular files with more than one name */
    int64_t error;  /* errno of what ended the listing early */
    int64_t proof_bytes;
    int64_t newest_ns;   /* the latest ctime of a file or link; INT64_MIN where there is none */
    int64_t small_bytes; /* of the small regular files */
    int64_t links;       /* symbolic ones */
    int64_t marked;      /* the kind, plus one, of the entry of the name that was asked about; 0 where there is none */
    char *names[KINDS];
    Row *rows[KINDS];
    char *proof; /* of the small ones, as flowengine/store/proofs.py has it */
} Listing;

int64_t flow_many_interface(void) { return INTERFACE; }

static int64_t ns(struct timespec t) { return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }

static void fill(Row *row, const struct stat *st) {
    row->ino = (int64_t)st->st_ino;
    row->size = st->st_size;
    row->mtime_ns = ns(st->st_mtim);
    row->ctime_ns = ns(st->st_ctim);
    row->mode = st->st_mode;
    row->nlink = (int64_t)st->st_nlink;
    row->blocks = st->st_blocks;
    row->dev = (int64_t)st->st_dev;
    row->uid = st->st_uid;
    row->gid = st->st_gid;
}

static int kind_of(const Row *row, int64_t large) {
    if (S_ISREG(row->mode)) return row->size < large ? SMALL : LARGE;
    if (S_ISLNK(row->mode)) return SMALL;
    return S_ISDIR(row->mode) ? FOLDER : OTHER;
}

/* u32 count, five numbers of each, the names with a slash between them; little-endian as this file demands. What `at`
   points to has a byte more than that. */
void flow_prove(const char *names, int64_t name_bytes, const Row *rows, int64_t count, char *at) {
    uint32_t number = (uint32_t)count;
    memcpy(at, &number, 4);
    at += 4;
    for (int64_t i = 0; i < count; i++, at += 40) memcpy(at, &rows[i], 40);
    memcpy(at, names, (size_t)name_bytes);
    for (int64_t i = 0; i + 1 < name_bytes; i++)
        if (!at[i]) at[i] = '/';
}

static int prove(Listing *out) {
    int64_t count = out->count[SMALL], names = out->name_bytes[SMALL];
    if (!count) return 0;
    out->proof = malloc((size_t)(4 + 40 * count + names));
    if (!out->proof) return ENOMEM;
    flow_prove(out->names[SMALL], names, out->rows[SMALL], count, out->proof);
    out->proof_bytes = 3 + 40 * count + names;
    return 0;
}

static int by_name(const void *a, const void *b) {
    const Item *x = a, *y = b;
    size_t least = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->name, y->name, least);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

static void count_in(Listing *out, const Item *item, int kind, const char *marked) {
    const Row *row = &item->row;
    out->count[kind]++;
    out->name_bytes[kind] += (int64_t)item->length + 1;
    if (!strcmp(item->name, marked)) out->marked = kind + 1;
    if (kind > LARGE) return;
    if (row->ctime_ns > out->newest_ns) out->newest_ns = row->ctime_ns;
    if (kind == LARGE) return;
    out->linked += row->nlink > 1 && S_ISREG(row->mode);
    out->links += !S_ISREG(row->mode);
    out->small_bytes += S_ISREG(row->mode) ? row->size : 0;
}

/* All entries of a folder with their stats, by kind, each kind in order of the names; and whether one is called `marked`. */
int64_t flow_list(int64_t fd, int64_t large, const char *marked, Listing *out) {
    memset(out, 0, sizeof *out);
    out->newest_ns = INT64_MIN;
    int copy = fcntl((int)fd, F_DUPFD_CLOEXEC, 0);
    DIR *folder = copy < 0 ? NULL : fdopendir(copy);
    if (!folder) {
        int error = errno;
        if (copy >= 0) close(copy);
        return out->error = error;
    }
    rewinddir(folder);
    Item *items = NULL;
    char *names = NULL;
    size_t count = 0, room = 0, used = 0, space = 0;
    int error = 0;
    for (;;) {
        errno = 0;
        struct dirent *entry = readdir(folder);
        if (!entry) {
            error = errno;
            break;
        }
        const char *name = entry->d_name;
        if (name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]))) continue;
        struct stat st;
        if (fstatat((int)fd, name, &st, AT_SYMLINK_NOFOLLOW)) {
            if (errno == ENOENT) continue; /* gone between listing and stat: never seen */
            error = errno;
            break;
        }
        size_t length = strlen(name);
        if (count == room) {
            size_t more = room ? 2 * room : 64;
            Item *grown = realloc(items, more * sizeof *items);
            if (!grown) {
                error = ENOMEM;
                break;
            }
            items = grown, room = more;
        }
        if (used + length + 1 > space) {
            size_t more = 2 * space + length + 1024;
            char *grown = realloc(names, more);
            if (!grown) {
                error = ENOMEM;
                break;
            }
            names = grown, space = more;
        }
        memcpy(names + used, name, length + 1);
        items[count].name = (const char *)used;
        items[count].length = length;
        fill(&items[count].row, &st);
        used += length + 1;
        count++;
    }
    rewinddir(folder); /* the descriptor's place is shared */
    closedir(folder);
    for (size_t i = 0; i < count; i++) items[i].name = names + (size_t)items[i].name;
    if (count) qsort(items, count, sizeof *items, by_name);
    for (size_t i = 0; i < count; i++) count_in(out, &items[i], kind_of(&items[i].row, large), marked);
    for (int kind = 0; kind < KINDS; kind++) {
        if (!out->count[kind]) continue;
        out->names[kind] = malloc((size_t)out->name_bytes[kind]);
        out->rows[kind] = malloc((size_t)out->count[kind] * sizeof(Row));
        if (!out->names[kind] || !out->rows[kind]) {
            error = ENOMEM;
            memset(out->count, 0, sizeof out->count);
            memset(out->name_bytes, 0, sizeof out->name_bytes);
            count = 0;
            break;
        }
    }
    int64_t at[KINDS] = {0}, byte[KINDS] = {0};
    for (size_t i = 0; i < count; i++) {
        int kind = kind_of(&items[i].row, large);
        memcpy(out->names[kind] + byte[kind], items[i].name, items[i].length + 1);
        byte[kind] += (int64_t)items[i].length + 1;
        out->rows[kind][at[kind]++] = items[i].row;
    }
    if (prove(out)) error = ENOMEM;
    free(items);
    free(names);
    return out->error = error;
}

/* The same of a folder of an open one, with its own stat; its descriptor, or below 0 what kept it from being opened. */
int64_t flow_list_at(int64_t parent, const char *name, int64_t large, const char *marked, Listing *out, Row *row) {
    struct stat st;
    int fd = openat((int)parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) return -errno;
    if (fstat(fd, &st)) {
        int error = errno;
        close(fd);
        return -error;
    }
    fill(row, &st);
    flow_list(fd, large, marked, out);
    return fd;
}

void flow_free(Listing *out) {
    for (int kind = 0; kind < KINDS; kind++) {
        free(out->names[kind]);
        free(out->rows[kind]);
    }
    free(out->proof);
    memset(out, 0, sizeof *out);
}

/* A file's bytes that took longer than this to read came from a disk or a server, and not from memory. */
#define COLD_NS(size) (50000 + (size))
/* So many files are open at a time where they do: each is asked for before those in front of it are read. */
#define AHEAD 32

static int64_t clock_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ns(now);
}

/* The bytes of a file that is as expected (size, mtime, ctime); 0 where it is not. Closes it. */
static int read_one(int fd, const int64_t *expected, char *buffer) {
    int64_t size = expected[0];
    ssize_t got;
    struct stat st;
    do /* one byte more than expected shows growth without another call */
        got = pread(fd, buffer, (size_t)size + 1, 0);
    while (got < 0 && errno == EINTR);
    int failed = fstat(fd, &st);
    close(fd);
    return !failed && got == size && st.st_size == size && ns(st.st_mtim) == expected[1] &&
           ns(st.st_ctim) == expected[2];
}

/* Read files whole, one behind the other, while each is as expected (size, mtime, ctime of each, `stride` numbers
   apart); how many were. Of an empty one there is nothing to read. Where they are cold, files behind are asked for ahead,
   so that a disk has many to fetch; `was_cold` is kept from call to call, since what comes next is likely to be as what
   came last. */
int64_t flow_read(int64_t folder, const char *names, int64_t count, const int64_t *expected, int64_t stride,
                  char *buffer, int64_t *was_cold) {
    int open_files[AHEAD], cold = *was_cold != 0;
    int64_t opened = 0, done = 0;
    const int64_t *ahead = expected;
    for (; done < count; done++, expected += stride) {
        for (; opened < count && opened < done + (cold ? AHEAD : 1); opened++, names += strlen(names) + 1, ahead += stride) {
            open_files[opened % AHEAD] = -1;
            if (!ahead[0]) continue;
            /* a pipe in the file's place holds nobody up */
            int fd = openat((int)folder, names, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
            if (cold && fd >= 0) posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED);
            open_files[opened % AHEAD] = fd;
        }
        if (!expected[0]) continue;
        int fd = open_files[done % AHEAD];
        int64_t begun = done && cold ? 0 : clock_ns(); /* once it is known, only a call's first file tells anew */
        if (fd < 0 || !read_one(fd, expected, buffer)) {
            for (int64_t behind = done + 1; behind < opened; behind++)
                if (open_files[behind % AHEAD] >= 0) close(open_files[behind % AHEAD]);
            return done;
        }
        if (begun) *was_cold = cold = clock_ns() - begun > COLD_NS(expected[0]);
        buffer += expected[0];
    }
    return count;
}

static void both_times(int64_t mtime_ns, struct timespec times[2]) {
    int64_t s = mtime_ns / 1000000000, rest = mtime_ns % 1000000000;
    if (rest < 0) s--, rest += 1000000000;
    times[0] = times[1] = (struct timespec){.tv_sec = s, .tv_nsec = rest};
}

static int write_one(int folder, const char *name, const char *data, int64_t size, mode_t mode, int64_t mtime_ns,
                     int64_t umask) {
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (fd < 0) return errno;
    int error = 0;
    while (size > 0) {
        ssize_t done = write(fd, data, (size_t)size);
        if (done < 0) {
            if (errno == EINTR) continue;
            error = errno;
            break;
        }
        data += done;
        size -= done;
    }
    if (!error && (mode & (mode_t)umask) && fchmod(fd, mode)) error = errno;
    if (!error) {
        struct timespec times[2];
        both_times(mtime_ns, times);
        if (futimens(fd, times)) error = errno;
    }
    if (close(fd) && !error && errno != EINTR) error = errno;
    return error;
}

/* Make files; for each: where its bytes begin, how many, its mode and time. Bits of `umask` are given once more, since the
   system takes them away. errno of the first that fails, or 0. */
int64_t flow_write(int64_t folder, const char *names, int64_t count, const int64_t *what, const char *data, int64_t umask) {
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1, what += 4) {
        int error = write_one((int)folder, names, data + what[0], what[1], (mode_t)what[2], what[3], umask);
        if (error) return error;
    }
    return 0;
}

/* Rename files, each to its folder, and look at each there; its errno, 0 or (the stat's) below 0. */
void flow_place(int64_t from, const char *names, const int64_t *folders, const char *to, int64_t count, Row *rows,
                int64_t *errors) {
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1, to += strlen(to) + 1) {
        struct stat st;
        errors[i] = 0;
        if (renameat((int)from, names, (int)folders[i], to)) errors[i] = errno;
        else if (fstatat((int)folders[i], to, &st, AT_SYMLINK_NOFOLLOW)) errors[i] = -errno;
        else fill(&rows[i], &st);
    }
}

/* --- entries in their encoded form: MessagePack arrays of eleven fields each, as docs/spec/manifest.md has them ------ */

#define CHUNK 36
#define MAX_CHUNK (4 << 20)
#define MAX_INLINE 1024
#define MAX_NAME 255
#define PAGE_ENTRIES 1024
#define PAGE_WEIGHT (128 << 10)

typedef struct {
    const uint8_t *at, *end;
    const uint8_t *name, *chunks;
    int64_t name_length, chunk_bytes, mode, mtime_ns, size;
} Cursor;

/* A whole number in its shortest form; 0 where there is none. */
static int whole(Cursor *c, int64_t *value) {
    if (c->at >= c->end) return 0;
    int first = *c->at++;
    if (first < 0x80) return *value = first, 1;
    if (first >= 0xe0) return *value = first - 256, 1;
    static const int widths[8] = {1, 2, 4, 8, 1, 2, 4, 8};
    if (first < 0xcc || first > 0xd3) return 0;
    int width = widths[first - 0xcc];
    if (c->end - c->at < width) return 0;
    uint64_t bits = 0;
    for (int i = 0; i < width; i++) bits = bits << 8 | *c->at++;
    if (first < 0xd0) {
        static const uint64_t least[9] = {0, 0x80, 0x100, 0, 0x10000, 0, 0, 0, 0x100000000};
        if (bits < least[width] || bits > INT64_MAX) return 0;
        return *value = (int64_t)bits, 1;
    }
    int64_t number = width == 1 ? (int8_t)bits : width == 2 ? (int16_t)bits : width == 4 ? (int32_t)bits : (int64_t)bits;
    static const int64_t most[9] = {0, -33, -129, 0, -32769, 0, 0, 0, -2147483649LL};
    if (number > most[width]) return 0;
    return *value = number, 1;
}

static int binary(Cursor *c, const uint8_t **data, int64_t *length) {
    if (c->end - c->at < 2) return 0;
    int kind = *c->at++;
    if (kind == 0xc4) *length = *c->at++;
    else if (kind == 0xc5 && c->end - c->at >= 2) {
        *length = c->at[0] << 8 | c->at[1], c->at += 2;
        if (*length < 256) return 0;
    } else return 0;
    if (c->end - c->at < *length) return 0;
    *data = c->at;
    c->at += *length;
    return 1;
}

/* Next entry, if it is a file whose chunks are all in it, with nothing else, and true in itself. */
static int next_file(Cursor *c) {
    static const uint8_t tail[] = {0xc4, 0, 0, 0xc4, 0, 0xc4, 0, 0}; /* link, flags, extra, runs, depth */
    if (c->end - c->at < 2 || *c->at++ != 0x9b || !binary(c, &c->name, &c->name_length)) return 0;
    if (c->at >= c->end || *c->at++) return 0; /* kind */
    if (!whole(c, &c->mode) || !whole(c, &c->mtime_ns) || !whole(c, &c->size)) return 0;
    if (!binary(c, &c->chunks, &c->chunk_bytes)) return 0;
    if (c->end - c->at < (int64_t)sizeof tail || memcmp(c->at, tail, sizeof tail)) return 0;
    c->at += sizeof tail;
    const uint8_t *name = c->name;
    int64_t length = c->name_length;
    if (length < 1 || length > MAX_NAME || memchr(name, 0, length) || memchr(name, '/', length)) return 0;
    if (name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'))) return 0;
    if (c->mode < 0 || c->mode > 07777 || c->size < 0) return 0;
    if (c->chunk_bytes % CHUNK || c->chunk_bytes > MAX_INLINE * CHUNK) return 0;
    int64_t sum = 0;
    for (int64_t at = 0; at < c->chunk_bytes; at += CHUNK) {
        uint32_t one;
        memcpy(&one, c->chunks + at, 4);
        if (one < 1 || one > MAX_CHUNK) return 0;
        sum += one;
    }
    return sum == c->size;
}

static int64_t open_list(Cursor *c, const uint8_t *data, int64_t length) {
    c->at = data, c->end = data + length;
    if (length < 1) return -1;
    int first = *c->at++;
    if ((first & 0xf0) == 0x90) return first & 15;
    if (first == 0xdc && length >= 3) {
        int64_t count = c->at[0] << 8 | c->at[1];
        c->at += 2;
        return count < 16 ? -1 : count;
    }
    if (first == 0xdd && length >= 5) {
        int64_t count = (int64_t)c->at[0] << 24 | c->at[1] << 16 | c->at[2] << 8 | c->at[3];
        c->at += 4;
        return count < 65536 ? -1 : count;
    }
    return -1;
}

static uint32_t crc_table[256];

static void __attribute__((constructor)) make_crc_table(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ c >> 1 : c >> 1;
        crc_table[i] = c;
    }
}

static uint32_t crc(const uint8_t *data, int64_t length) {
    uint32_t c = ~0u;
    for (int64_t i = 0; i < length; i++) c = crc_table[(c ^ data[i]) & 255] ^ c >> 8;
    return ~c;
}

typedef struct {
    int64_t end; /* in the data, behind its last entry */
    int64_t count, size_bytes, chunks, weight, name_at, name_length; /* the last entry's name */
    int64_t mode_bits; /* those that any of them has */
} Segment;

/* Where a run of entries is cut to pages (flowengine/manifest/cut.py), of which the first has `count` entries of
   `weight` already; the last segment ends with no cut, and may be empty. How many segments; 0 where an entry is no file
   that is whole in itself, or the names do not rise; -1 where there is no room for all. */
int64_t flow_segments(const uint8_t *data, int64_t length, int64_t count, int64_t weight, Segment *out, int64_t room) {
    Cursor c;
    int64_t left = open_list(&c, data, length), made = 0, before = 0;
    const uint8_t *last = NULL;
    if (left < 1) return 0;
    Segment one = {0};
    for (; left; left--) {
        if (!next_file(&c)) return 0;
        if (last) {
            int order = memcmp(last, c.name, before < c.name_length ? before : c.name_length);
            if (order > 0 || (!order && before >= c.name_length)) return 0;
        }
        last = c.name, before = c.name_length;
        int64_t own = 40 + c.name_length + c.chunk_bytes;
        one.count++, one.size_bytes += c.size, one.chunks += c.chunk_bytes / CHUNK, one.weight += own;
        one.mode_bits |= c.mode;
        one.end = c.at - data, one.name_at = c.name - data, one.name_length = c.name_length;
        count++, weight += own;
        uint32_t mixed = crc(c.name, c.name_length) * 0x9e3779b1u;
        if (mixed < (own <= 256 ? 1u << 24 : (uint64_t)own << 16) || count >= PAGE_ENTRIES || weight >= PAGE_WEIGHT) {
            if (made + 2 > room) return -1;
            out[made++] = one;
            memset(&one, 0, sizeof one);
            one.end = c.at - data;
            count = weight = 0;
        }
    }
    if (c.at != c.end) return 0;
    if (made + 1 > room) return -1;
    out[made++] = one;
    return made;
}

/* Entries as columns: names with NUL behind each; of each its chunks' bytes, size, mode, mtime and end in the data; and
   all chunks one behind the other. The data passed `flow_segments`. Gives the bytes of the names. */
int64_t flow_columns(const uint8_t *data, int64_t length, char *names, int64_t *numbers, uint8_t *chunks) {
    Cursor c;
    const char *first = names;
    int64_t left = open_list(&c, data, length);
    for (; left > 0 && next_file(&c); left--, numbers += 5) {
        memcpy(names, c.name, c.name_length);
        names += c.name_length;
        *names++ = 0;
        memcpy(chunks, c.chunks, c.chunk_bytes);
        chunks += c.chunk_bytes;
        numbers[0] = c.chunk_bytes, numbers[1] = c.size, numbers[2] = c.mode, numbers[3] = c.mtime_ns;
        numbers[4] = c.at - data;
    }
    return names - first;
}

/* Whether a folder's small objects are regular files of these names and sizes and, where asked for, modes and times. */
int64_t flow_same(const uint8_t *data, int64_t length, const char *names, const Row *rows, int64_t count, int64_t all) {
    Cursor c;
    if (open_list(&c, data, length) != count) return 0;
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1) {
        if (!next_file(&c)) return 0;
        if (!S_ISREG(rows[i].mode) || rows[i].size != c.size) return 0;
        if (all && (rows[i].mode != (S_IFREG | c.mode) || rows[i].mtime_ns != c.mtime_ns)) return 0;
        if (strncmp(names, (const char *)c.name, c.name_length) || names[c.name_length]) return 0;
    }
    return 1;
}

/* Bytes of proofs after which no more folders are looked at together: a folder of many files is as well looked at by itself. */
#define MANY_PROOFS (256 << 10)

/* What is told of one of several folders that may hold nothing but files. */
typedef struct {
    Row row;             /* its own */
    int64_t plain;       /* 0: it must be entered; else all below is known */
    int64_t proof_bytes; /* of its files, behind those of the folders before it */
} Leaf;

/* Looks at folders of an open one as `flow_list_at` does, each by itself. One is plain where it holds nothing but files and
   links that are small and of one name; and, where entries are given, just these files. Their proofs, one behind the other, are
   for `flow_free_proofs`; NULL where there is no memory for them. Once these are many, no more folders are looked at. */
char *flow_leaves(int64_t parent, const char *names, int64_t count, int64_t large, const char *marked, const char *const *entries,
                  const int64_t *lengths, Leaf *out) {
    size_t room = 1 << 16, used = 0;
    char *proofs = malloc(room);
    memset(out, 0, (size_t)count * sizeof *out);
    for (int64_t i = 0; i < count && proofs && used < MANY_PROOFS; i++, names += strlen(names) + 1) {
        Leaf *leaf = &out[i];
        Listing found;
        int64_t fd = flow_list_at(parent, names, large, marked, &found, &leaf->row);
        if (fd < 0) continue;
        close((int)fd);
        leaf->plain = !found.error && !found.count[LARGE] && !found.count[FOLDER] && !found.count[OTHER] && !found.marked &&
                      !found.linked;
        if (leaf->plain && entries)
            leaf->plain = flow_same((const uint8_t *)entries[i], lengths[i], found.names[SMALL], found.rows[SMALL],
                                    found.count[SMALL], 1);
        if (leaf->plain && found.proof_bytes) {
            size_t more = (size_t)found.proof_bytes;
            if (used + more > room) {
                char *grown = realloc(proofs, room = 2 * (used + more));
                if (!grown) free(proofs);
                proofs = grown;
            }
            if (proofs) memcpy(proofs + used, found.proof, more);
            used += more;
            leaf->proof_bytes = found.proof_bytes;
        }
        flow_free(&found);
    }
    return proofs;
}

void flow_free_proofs(char *proofs) { free(proofs); }

static uint8_t *put_whole(uint8_t *at, int64_t value) {
    int width;
    uint64_t bits = (uint64_t)value;
    if (value >= 0) {
        if (value < 0x80) return *at++ = (uint8_t)value, at;
        width = value < 0x100 ? 0 : value < 0x10000 ? 1 : value < 0x100000000 ? 2 : 3;
        *at++ = 0xcc + width;
    } else {
        if (value >= -32) return *at++ = (uint8_t)value, at;
        width = value >= -128 ? 0 : value >= -32768 ? 1 : value >= -2147483648LL ? 2 : 3;
        *at++ = 0xd0 + width;
    }
    for (int shift = (8 << width) - 8; shift >= 0; shift -= 8) *at++ = (uint8_t)(bits >> shift);
    return at;
}

static uint8_t *put_binary(uint8_t *at, const void *data, int64_t length) {
    if (length < 256) *at++ = 0xc4;
    else *at++ = 0xc5, *at++ = (uint8_t)(length >> 8);
    *at++ = (uint8_t)length;
    memcpy(at, data, length);
    return at + length;
}

/* Encode files of these names and stats, of which `counts` has the number of chunks and `packed` the chunks, as a list, and
   give its segments. `out` has room for 5 bytes and for each entry 48, its name and its chunks; the segments for `room` of
   them, and if it are more, `segments` is below 0. How many bytes it takes. */
int64_t flow_block(const char *names, const Row *rows, int64_t count, int64_t mode_bits, const int64_t *counts,
                   const uint8_t *packed, uint8_t *out, Segment *found, int64_t room, int64_t *segments) {
    uint8_t *at = out;
    if (count < 16) *at++ = 0x90 | (uint8_t)count;
    else if (count < 65536) *at++ = 0xdc, *at++ = (uint8_t)(count >> 8), *at++ = (uint8_t)count;
    else {
        *at++ = 0xdd;
        for (int shift = 24; shift >= 0; shift -= 8) *at++ = (uint8_t)(count >> shift);
    }
    for (int64_t i = 0; i < count; i++) {
        size_t length = strlen(names);
        *at++ = 0x9b;
        at = put_binary(at, names, (int64_t)length);
        names += length + 1;
        *at++ = 0;
        at = put_whole(at, rows[i].mode & mode_bits);
        at = put_whole(at, rows[i].mtime_ns);
        at = put_whole(at, rows[i].size);
        at = put_binary(at, packed, counts[i] * CHUNK);
        packed += counts[i] * CHUNK;
        memcpy(at, "\xc4\0\0\xc4\0\xc4\0", 8);
        at += 8;
    }
    *segments = flow_segments(out, at - out, 0, 0, found, room);
    return at - out;
}

/* What cuts files that lie one behind the other in memory, and names the chunks: `flow_pack_many` of the library that can. */
typedef int64_t Pack(const void *rule, const char *data, const int64_t *sizes, int64_t stride, int64_t count, int64_t *counts,
                     uint8_t *packed, int64_t room);

/* Read files as `flow_read` does, cut and name them by `pack`, which has room for `chunks` of them, and encode them as
   `flow_block` does. Below 0 where one of the files is not (any more) as it was listed, or there is no room. */
int64_t flow_read_block(int64_t folder, const char *names, const Row *rows, int64_t count, char *buffer, int64_t *was_cold,
                        Pack *pack, const void *rule, int64_t *counts, uint8_t *packed, int64_t chunks, int64_t mode_bits,
                        uint8_t *out, Segment *found, int64_t room, int64_t *segments) {
    const int64_t stride = sizeof *rows / sizeof(int64_t);
    if (flow_read(folder, names, count, &rows->size, stride, buffer, was_cold) != count) return -1;
    if (pack(rule, buffer, &rows->size, sizeof *rows, count, counts, packed, chunks) < 0) return -1;
    return flow_block(names, rows, count, mode_bits, counts, packed, out, found, room, segments);
}

/* --- a run of files that landed: numbers as `flow_columns` gives them, staging names made of numbers ----------------- */

#define PART_BITS 40 /* as in flowengine/store/runs.py */
#define STAGED 24 /* room for a name */

/* What a staging file is called in its part of the staging folder, which the upper bits of the number say. */
static void staged(char *name, int64_t number) {
    sprintf(name, "%llx", (unsigned long long)number & ((1ULL << PART_BITS) - 1));
}

/* Make the staging files of a run, whose bytes lie one behind the other, as `flow_write` does. */
int64_t flow_write_run(int64_t folder, int64_t first, int64_t count, const int64_t *numbers, const char *data,
                       int64_t umask) {
    char name[STAGED];
    for (int64_t i = 0; i < count; i++, numbers += 5) {
        staged(name, first + i);
        int error = write_one((int)folder, name, data, numbers[1], (mode_t)numbers[2], numbers[3], umask);
        if (error) return error;
        data += numbers[1];
    }
    return 0;
}

/* Give the files of a run their names in a folder and look at each there, as `flow_place` does. How many failed. */
int64_t flow_place_run(int64_t from, int64_t first, int64_t to, const char *names, int64_t count, Row *rows,
                       int64_t *errors) {
    char name[STAGED];
    int64_t folder = to, failed = 0;
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1) {
        staged(name, first + i);
        flow_place(from, name, &folder, names, 1, rows + i, errors + i);
        failed += errors[i] != 0;
    }
    return failed;
}

typedef struct {
    int64_t depth; /* below the folder that all lie in; one more than that of the folder before it at most */
    int64_t mode, mtime_ns, files;
} Folder;

/* A folder that is being filled has all it is to have: its mode and time, and its stat. */
static int64_t dress_folder(int fd, const Folder *folder, Row *row) {
    struct stat st;
    struct timespec times[2];
    both_times(folder->mtime_ns, times);
    if (fchmod(fd, (mode_t)folder->mode) || futimens(fd, times) || fstat(fd, &st)) return -errno;
    fill(row, &st);
    return 0;
}

/* Make folders below `base`, parents first, and give the files of a run their names in them, as `flow_place_run` does; of
   those marked in `left_out` there is no staging file. Of each folder: errno of what kept it from being made, as of all in
   it, or below 0 of what kept it from its mode and time. With `sync` each folder is made durable. How much failed; below
   0 the errno for all of it: there is no memory, or a folder cannot be made durable. */
int64_t flow_place_folders(int64_t base, const char *names, const Folder *folders, int64_t count, int64_t from,
                           int64_t first, const char *files, const uint8_t *left_out, Row *rows, int64_t *errors,
                           Row *folder_rows, int64_t *folder_errors, int64_t sync) {
    int64_t failed = 0, depth = 0, number = 0, lost = 0;
    int *open_fds = malloc((size_t)(count + 1) * sizeof *open_fds);
    int64_t *open_folders = malloc((size_t)(count + 1) * sizeof *open_folders);
    if (!open_fds || !open_folders) {
        free(open_fds);
        free(open_folders);
        return -ENOMEM;
    }
    for (int64_t i = 0; i <= count; i++, names += strlen(names) + 1) {
        for (int64_t least = i < count ? folders[i].depth : 0; depth > least;) {
            int64_t done = open_folders[--depth];
            if (open_fds[depth] < 0) continue;
            folder_errors[done] = dress_folder(open_fds[depth], &folders[done], &folder_rows[done]);
            if (sync && fsync(open_fds[depth])) lost = errno;
            close(open_fds[depth]);
            failed += folder_errors[done] != 0;
        }
        if (i == count) break;
        int above = depth ? open_fds[depth - 1] : (int)base, fd = -1;
        int64_t error = depth && above < 0 ? folder_errors[open_folders[depth - 1]] : 0;
        if (!error && mkdirat(above, names, 0700) && errno != EEXIST) error = errno;
        if (!error && (fd = openat(above, names, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)) < 0) error = errno;
        open_fds[depth] = fd, open_folders[depth++] = i;
        folder_errors[i] = error;
        failed += error != 0;
        for (int64_t n = 0; n < folders[i].files; n++, number++, files += strlen(files) + 1) {
            char name[STAGED];
            int64_t to = fd;
            errors[number] = error;
            if (left_out[number]) errors[number] = 0;
            else if (!error) {
                staged(name, first + number);
                flow_place(from, name, &to, files, 1, rows + number, errors + number);
            }
            failed += errors[number] != 0;
        }
    }
    free(open_fds);
    free(open_folders);
    return lost ? -lost : failed;
}

/* Give one file another mode and time, if it is still what `row` says, and look at it again. */
static int touch_one(int folder, const char *name, mode_t mode, int64_t mtime_ns, Row *row) {
    int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) return 0;
    struct stat st;
    Row now;
    struct timespec times[2];
    both_times(mtime_ns, times);
    int done = !fstat(fd, &st);
    if (done) fill(&now, &st);
    done = done && !memcmp(&now, row, 5 * sizeof(int64_t)) && now.dev == row->dev &&
           ((now.mode & 07777) == (int64_t)mode || !fchmod(fd, mode)) && !futimens(fd, times) && !fstat(fd, &st);
    if (done) fill(row, &st);
    close(fd);
    return done;
}

/* Give files of a folder, of which `rows` has the stats, the modes and times that they are to have (numbers as `flow_columns`
   gives them), and look at those again. How many are right then, from the first on. */
int64_t flow_touch(int64_t folder, const char *names, int64_t count, const int64_t *numbers, Row *rows) {
    for (int64_t i = 0; i < count; i++, numbers += 5, names += strlen(names) + 1) {
        if (rows[i].mode == (S_IFREG | numbers[2]) && rows[i].mtime_ns == numbers[3]) continue;
        if (!touch_one((int)folder, names, (mode_t)numbers[2], numbers[3], &rows[i])) return i;
    }
    return count;
}

/* Rows of the log of a chunk index (flowengine/store/index_log.py) for files of a folder; how many bytes. `out` has room
   for each for 30 bytes, the prefix, its name and its chunks. */
int64_t flow_log(const char *prefix, int64_t prefix_bytes, const char *names, const Row *rows, const int64_t *numbers,
                 const char *chunks, int64_t count, char *out) {
    char *at = out;
    for (int64_t i = 0; i < count; i++, numbers += 5) {
        size_t length = strlen(names);
        uint16_t path = (uint16_t)(prefix_bytes + length);
        uint32_t packed = (uint32_t)numbers[0];
        if (packed) {
            int64_t rest[3] = {rows[i].size, rows[i].mtime_ns, 0};
            memcpy(at, &path, 2);
            memcpy(at + 2, &packed, 4);
            memcpy(at + 6, rest, 24);
            memcpy(at + 30, prefix, (size_t)prefix_bytes);
            at += 30 + prefix_bytes;
            memcpy(at, names, length);
            memcpy(at + length, chunks, packed);
            at += length + packed;
        }
        names += length + 1, chunks += packed;
    }
    return at - out;
}

/* Of files in some folders, `files` of them in each, whose paths end with a slash: the proof of each folder as `flow_prove` has
   it, one behind the other, and where each ends; and rows of the log as `flow_log` has them. How many bytes the log has. */
int64_t flow_note(const char *paths, const int64_t *files, int64_t folders, const char *names, const Row *rows,
                  const int64_t *numbers, const char *chunks, char *proofs, int64_t *ends, char *log) {
    char *at = proofs, *out = log;
    for (int64_t i = 0; i < folders; i++) {
        const char *end = names;
        for (int64_t n = 0; n < files[i]; n++) end += strlen(end) + 1;
        flow_prove(names, end - names, rows, files[i], at);
        at += 3 + 40 * files[i] + (end - names);
        ends[i] = at - proofs;
        out += flow_log(paths, (int64_t)strlen(paths), names, rows, numbers, chunks, files[i], out);
        for (int64_t n = 0; n < files[i]; n++, numbers += 5) chunks += numbers[0];
        paths += strlen(paths) + 1, names = end, rows += files[i];
    }
    return out - log;
}

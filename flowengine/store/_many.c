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

#define INTERFACE 1
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

/* u32 count, five numbers of each, the names with a slash between them; little-endian as this file demands. */
static int prove(Listing *out) {
    size_t count = (size_t)out->count[SMALL], names = (size_t)out->name_bytes[SMALL];
    if (!count) return 0;
    size_t size = 4 + 40 * count + names - 1;
    char *at = out->proof = malloc(size + 1);
    if (!at) return ENOMEM;
    uint32_t number = (uint32_t)count;
    memcpy(at, &number, 4);
    at += 4;
    for (size_t i = 0; i < count; i++, at += 40) memcpy(at, &out->rows[SMALL][i], 40);
    memcpy(at, out->names[SMALL], names);
    for (size_t i = 0; i + 1 < names; i++)
        if (!at[i]) at[i] = '/';
    out->proof_bytes = (int64_t)size;
    return 0;
}

static int by_name(const void *a, const void *b) {
    const Item *x = a, *y = b;
    size_t least = x->length < y->length ? x->length : y->length;
    int order = memcmp(x->name, y->name, least);
    return order ? order : (x->length > y->length) - (x->length < y->length);
}

/* All entries of a folder with their stats, by kind, each kind in order of the names. */
int64_t flow_list(int64_t fd, int64_t large, Listing *out) {
    memset(out, 0, sizeof *out);
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
    for (size_t i = 0; i < count; i++) {
        int kind = kind_of(&items[i].row, large);
        out->count[kind]++;
        out->name_bytes[kind] += (int64_t)items[i].length + 1;
    }
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
        out->linked += kind == SMALL && items[i].row.nlink > 1 && S_ISREG(items[i].row.mode);
    }
    if (prove(out)) error = ENOMEM;
    free(items);
    free(names);
    return out->error = error;
}

void flow_free(Listing *out) {
    for (int kind = 0; kind < KINDS; kind++) {
        free(out->names[kind]);
        free(out->rows[kind]);
    }
    free(out->proof);
    memset(out, 0, sizeof *out);
}

/* Read files whole, one behind the other, while each is as expected (size, mtime, ctime of each); how many were. */
int64_t flow_read(int64_t folder, const char *names, int64_t count, const int64_t *expected, char *buffer) {
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1) {
        int64_t size = expected[3 * i];
        /* a pipe in the file's place holds nobody up */
        int fd = openat((int)folder, names, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
        if (fd < 0) return i;
        ssize_t got;
        struct stat st;
        do /* one byte more than expected shows growth without another call */
            got = pread(fd, buffer, (size_t)size + 1, 0);
        while (got < 0 && errno == EINTR);
        int failed = fstat(fd, &st);
        close(fd);
        if (failed || got != size || st.st_size != size || ns(st.st_mtim) != expected[3 * i + 1] ||
            ns(st.st_ctim) != expected[3 * i + 2])
            return i;
        buffer += size;
    }
    return count;
}

static int write_one(int folder, const char *name, const char *data, int64_t size, mode_t mode, int64_t mtime_ns) {
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
    if (!error) {
        int64_t s = mtime_ns / 1000000000, rest = mtime_ns % 1000000000;
        if (rest < 0) s--, rest += 1000000000;
        struct timespec times[2] = {{.tv_sec = s, .tv_nsec = rest}, {.tv_sec = s, .tv_nsec = rest}};
        if (futimens(fd, times)) error = errno;
    }
    if (close(fd) && !error && errno != EINTR) error = errno;
    return error;
}

/* Make files; for each: where its bytes begin, how many, its mode and time. errno of the first that fails, or 0. */
int64_t flow_write(int64_t folder, const char *names, int64_t count, const int64_t *what, const char *data) {
    for (int64_t i = 0; i < count; i++, names += strlen(names) + 1, what += 4) {
        int error = write_one((int)folder, names, data + what[0], what[1], (mode_t)what[2], what[3]);
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

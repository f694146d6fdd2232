/* Read, cut and hash in one call, in steps that the processor's cache holds: flowengine/store/reading.py. */
#include "_chunks.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define INTERFACE 3
#define STEP ((int64_t)256 << 10)
#define SHORT (-1000000) /* the file ends before it should; errno is nowhere near */

typedef struct {
    int64_t minimum, average, maximum;
    int64_t cut_way, hash_way;
} Rule;

/* Where it stands: bytes in the buffer, those of them that are chunks already, and the place from which a cut is still to
 * be looked for. */
typedef struct {
    int64_t filled, cut, looked;
} State;

int64_t flow_chunks_interface(void) { return INTERFACE; }

/* Chunks of what is in the buffer, from where `state` has it, with their names, of which `id` bytes are kept; how many, or
 * -1 where there is no memory. A chunk that ends with the buffer is one only at the end of the object. */
static int64_t cut(const Rule *rule, const uint8_t *buffer, State *state, int at_end, size_t id, uint8_t *packed,
                   int64_t room) {
    const Sizes sizes = {(size_t)rule->minimum, (size_t)rule->average, (size_t)rule->maximum};
    const size_t stride = 4 + id;
    const uint8_t *data = buffer + state->cut;
    int64_t count = 0;
    while (state->cut < state->filled && count < room) {
        const size_t size = (size_t)(state->filled - state->cut);
        const size_t length =
            flow_first(rule->cut_way, buffer + state->cut, size, (size_t)(state->looked - state->cut), &sizes);
        if (length == size && size < sizes.maximum && !at_end) {
            state->looked = state->filled;
            break;
        }
        const uint32_t told = (uint32_t)length;
        memcpy(packed + stride * (size_t)count++, &told, 4);
        state->cut += (int64_t)length;
        state->looked = state->cut;
    }
    if (id == ID)
        return flow_names(rule->hash_way, data, packed, count, stride, packed + 4, stride) ? -1 : count;
    uint8_t *names = malloc((size_t)(ID * (count ? count : 1)));
    if (!names || flow_names(rule->hash_way, data, packed, count, stride, names, ID)) {
        free(names);
        return -1;
    }
    for (int64_t i = 0; i < count; i++)
        memcpy(packed + stride * (size_t)i + 4, names + ID * i, id);
    free(names);
    return count;
}

/* Cut and name the chunks of bytes whose start counts as a cut and whose end ends the last chunk: how many, or -1 where there
 * is no memory. Names are kept to their first `id` bytes. */
int64_t flow_pack(const Rule *rule, const uint8_t *data, int64_t size, int64_t id, uint8_t *packed, int64_t room) {
    State state = {.filled = size};
    return cut(rule, data, &state, 1, (size_t)id, packed, room);
}

/* The same of many objects, one behind the other, of which `sizes` tells how long they are, `stride` bytes from one to the
 * next; `counts` gets the number of chunks of each. How many chunks all have, or -1 where there is no memory or no room. */
int64_t flow_pack_many(const Rule *rule, const uint8_t *data, const uint8_t *sizes, int64_t stride, int64_t objects,
                       int64_t *counts, uint8_t *packed, int64_t room) {
    const Sizes limits = {(size_t)rule->minimum, (size_t)rule->average, (size_t)rule->maximum};
    const uint8_t *at = data;
    int64_t chunks = 0;
    for (int64_t i = 0; i < objects; i++, sizes += stride) {
        int64_t left;
        memcpy(&left, sizes, sizeof left);
        counts[i] = chunks;
        while (left > 0) {
            const size_t length = flow_first(rule->cut_way, at, (size_t)left, 0, &limits);
            const uint32_t told = (uint32_t)length;
            if (chunks == room)
                return -1;
            memcpy(packed + PACKED * chunks++, &told, 4);
            at += length;
            left -= (int64_t)length;
        }
        counts[i] = chunks - counts[i];
    }
    return flow_names(rule->hash_way, data, packed, chunks, PACKED, packed + 4, PACKED) ? -1 : chunks;
}

/* Fill the buffer up to `until` from `offset` of a file on, and give the chunks that end in it, with their names: how many;
 * or below 0 an errno or SHORT. `ends`: the object ends at `until`. */
int64_t flow_read_chunks(int64_t fd, int64_t offset, const Rule *rule, uint8_t *buffer, State *state, int64_t until,
                         int64_t ends, uint8_t *packed, int64_t room) {
    int64_t count = 0;
    do {
        const int64_t step = until - state->filled < STEP ? until - state->filled : STEP;
        for (int64_t left = step; left;) {
            const ssize_t got = pread((int)fd, buffer + state->filled, (size_t)left, offset);
            if (got < 0 && errno == EINTR)
                continue;
            if (got <= 0)
                return got ? -errno : SHORT;
            state->filled += got;
            offset += got;
            left -= got;
        }
        const int64_t found = cut(rule, buffer, state, ends && state->filled == until, ID, packed + PACKED * count, room - count);
        if (found < 0)
            return -ENOMEM;
        count += found;
    } while (state->filled < until);
    return count;
}

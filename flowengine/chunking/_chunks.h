/* What the parts of the library `_chunks` know of each other; flowengine/chunking has what each is for. */
#ifndef FLOW_CHUNKS_H
#define FLOW_CHUNKS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are little-endian; Python does without this library"
#endif

#define ID 32          /* bytes of a chunk's name */
#define PACKED (4 + ID) /* of a chunk in a list: u32 length, name */

typedef struct {
    size_t minimum, average, maximum;
} Sizes;

static inline uint32_t word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* The length of the first chunk of bytes, of which no place before `from` is a cut. It is `size` where none is found. */
size_t flow_first(int64_t way, const uint8_t *data, size_t size, size_t from, const Sizes *sizes);

/* The names of pieces that lie one behind the other. The length of each is a u32, `stride` bytes from one to the next; names
 * go to `out`, `apart` bytes from one to the next. Gives 0, or -1 where there is no memory. */
int flow_names(int64_t way, const uint8_t *data, const uint8_t *lengths, int64_t count, size_t stride, uint8_t *out,
               size_t apart);

#endif

/* Where bytes are cut into chunks, by their content: docs/spec/chunking.md has the rule in words.
 *
 * Called by flowengine/chunking/cutting.py, which finds the same cuts without it.
 * A place is looked at by twelve of the bytes before it, many places at once, which leaves one in 256; what stands there is
 * looked at by all of the 64 bytes before it. No place depends on another, so there is no chain of additions to wait for.
 */
#include "_chunks.h"

#define REACH 68 /* bytes before a place that decide of it */
#define FACTOR 0xC2B2AE3Du
#define TOP 0x7F
#define BELOW_TOP 0x7EFFFFFF /* as signed words: greater than this is a top byte of TOP */

/* The first 64 bytes of blake3("flowengine cut") as words, made odd. */
static const uint64_t WEIGHTS[8] = {
    0x2d6f229983014235, 0x090d291710313f75, 0x7d229e818260c9c5, 0xbf0954f20935b08f,
    0xbe67dc22feeaae37, 0xdc9e7789942464bf, 0x0afb66cd3435fad9, 0x53fd2c313c017ec7,
};

typedef size_t First(const uint8_t *data, size_t size, size_t from, const Sizes *sizes);

static uint32_t turned(uint32_t value, int bits) { return value << bits | value >> (32 - bits); }

static int is_candidate(const uint8_t *place) {
    uint32_t sum = word(place - 4) + turned(word(place - 36), 8) + turned(word(place - 68), 16);
    return sum * FACTOR >> 24 == TOP;
}

/* The upper half of a sum over all of the 64 bytes before the place. */
static inline uint64_t weight(const uint8_t *place) {
    uint64_t sum = 0;
    for (int k = 0; k < 8; k++) {
        uint64_t value;
        memcpy(&value, place - 64 + 8 * k, sizeof value);
        sum += value * WEIGHTS[k];
    }
    return sum >> 32;
}

/* One in 2 * average of all places is a cut before the average is reached, and four times as many behind it; of these,
 * one in 256 is a candidate. */
static uint64_t rare(const Sizes *sizes) { return ((uint64_t)1 << 39) / sizes->average; }
static uint64_t often(const Sizes *sizes) { return ((uint64_t)1 << 41) / sizes->average; }

/* `flow_first`, by a function that gives the candidates among the next places as bits. BEGIN loads what the first of these
 * needs, with `kept` to hand it on from call to call. */
#define FIRST(NAME, TARGET, KEPT, BITS, LOWEST, BEGIN, CANDIDATES)                                                      \
    TARGET static size_t NAME(const uint8_t *data, size_t size, size_t from, const Sizes *sizes) {                      \
        if (size <= sizes->minimum)                                                                                    \
            return size;                                                                                               \
        const size_t end = size < sizes->maximum ? size : sizes->maximum;                                              \
        const size_t middle = sizes->average < end ? sizes->average : end;                                             \
        size_t at = from > sizes->minimum ? from : sizes->minimum;                                                     \
        for (int half = 0; half < 2; half++) {                                                                         \
            const size_t until = half ? end : middle;                                                                  \
            const uint64_t below = half ? often(sizes) : rare(sizes);                                                  \
            KEPT kept[4];                                                                                              \
            if (at + 8 * sizeof(BITS) <= until)                                                                        \
                BEGIN(data + at, kept);                                                                                \
            for (; at + 8 * sizeof(BITS) <= until; at += 8 * sizeof(BITS))                                             \
                for (BITS found = CANDIDATES(data + at, kept); __builtin_expect(found != 0, 0); found &= found - 1) { \
                    const size_t place = at + (size_t)LOWEST(found);                                                   \
                    if (weight(data + place) < below)                                                                  \
                        return place;                                                                                  \
                }                                                                                                      \
            for (; at < until; at++)                                                                                   \
                if (is_candidate(data + at) && weight(data + at) < below)                                              \
                    return at;                                                                                         \
        }                                                                                                              \
        return end;                                                                                                    \
    }

/* Any processor: sixteen places, each fourth of them in the lanes of one vector. */
typedef uint32_t Four __attribute__((vector_size(16)));

static inline Four four(const uint8_t *at) {
    Four value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint16_t candidates_16(const uint8_t *place, Four *kept) {
    (void)kept;
    Four any = {0};
    for (int phase = 0; phase < 4; phase++) {
        const Four near = four(place + phase - 4), middle = four(place + phase - 36), far = four(place + phase - 68);
        const Four sum = near + (middle << 8 | middle >> 24) + (far << 16 | far >> 16);
        any |= (Four)(sum * FACTOR >> 24 == TOP);
    }
    uint64_t lanes[2];
    memcpy(lanes, &any, sizeof lanes);
    uint16_t found = 0;
    if (__builtin_expect((lanes[0] | lanes[1]) != 0, 0))
        for (int k = 0; k < 16; k++)
            found |= (uint16_t)(is_candidate(place + k) << k);
    return found;
}

#define NOTHING(place, kept) ((void)(kept))
FIRST(first_anywhere, , Four, uint16_t, __builtin_ctz, NOTHING, candidates_16)

#if defined(__x86_64__)
#include <immintrin.h>

#define WITH_AVX2 __attribute__((target("avx2,bmi,bmi2")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,bmi,bmi2")))

/* Bytes of each word turned by one and by two. */
#define TURN_8 _mm_setr_epi8(3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13, 14)
#define TURN_16 _mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)

/* 32 places; what is near to these is in the middle for the next. */
WITH_AVX2 static inline void begin_32(const uint8_t *place, __m256i *kept) {
    for (int phase = 0; phase < 4; phase++)
        kept[phase] = _mm256_loadu_si256((const void *)(place + phase - 36));
}

WITH_AVX2 static inline uint32_t candidates_32(const uint8_t *place, __m256i *kept) {
    const __m256i turn_8 = _mm256_broadcastsi128_si256(TURN_8), turn_16 = _mm256_broadcastsi128_si256(TURN_16);
    const __m256i factor = _mm256_set1_epi32((int)FACTOR), below = _mm256_set1_epi32(BELOW_TOP);
    uint32_t found = 0;
#pragma GCC unroll 4
    for (int phase = 0; phase < 4; phase++) {
        const __m256i near = _mm256_loadu_si256((const void *)(place + phase - 4));
        const __m256i far = _mm256_loadu_si256((const void *)(place + phase - 68));
        const __m256i others =
            _mm256_add_epi32(_mm256_shuffle_epi8(kept[phase], turn_8), _mm256_shuffle_epi8(far, turn_16));
        const __m256i product = _mm256_mullo_epi32(_mm256_add_epi32(near, others), factor);
        const __m256i is_top = _mm256_cmpgt_epi32(product, below);
        found |= _pdep_u32((uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(is_top)), 0x11111111u << phase);
        kept[phase] = near;
    }
    return found;
}

FIRST(first_avx2, WITH_AVX2, __m256i, uint32_t, __builtin_ctz, begin_32, candidates_32)

/* 64 places; what is near to these is far from the next, and half of each is in the middle. */
WITH_AVX512 static inline void begin_64(const uint8_t *place, __m512i *kept) {
    for (int phase = 0; phase < 4; phase++)
        kept[phase] = _mm512_loadu_si512(place + phase - 68);
}

WITH_AVX512 static inline uint64_t candidates_64(const uint8_t *place, __m512i *kept) {
    const __m512i turn_8 = _mm512_broadcast_i32x4(TURN_8), turn_16 = _mm512_broadcast_i32x4(TURN_16);
    const __m512i factor = _mm512_set1_epi32((int)FACTOR), below = _mm512_set1_epi32(BELOW_TOP);
    uint64_t found = 0;
#pragma GCC unroll 4
    for (int phase = 0; phase < 4; phase++) {
        const __m512i near = _mm512_loadu_si512(place + phase - 4);
        const __m512i middle = _mm512_alignr_epi32(near, kept[phase], 8);
        const __m512i others =
            _mm512_add_epi32(_mm512_shuffle_epi8(middle, turn_8), _mm512_shuffle_epi8(kept[phase], turn_16));
        const __m512i product = _mm512_mullo_epi32(_mm512_add_epi32(near, others), factor);
        found |= _pdep_u64(_mm512_cmpgt_epi32_mask(product, below), 0x1111111111111111u << phase);
        kept[phase] = near;
    }
    return found;
}

FIRST(first_avx512, WITH_AVX512, __m512i, uint64_t, __builtin_ctzll, begin_64, candidates_64)
#endif

/* How many ways this processor has; the last is the quickest. */
int64_t flow_cut_ways(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("bmi2"))
        return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        return 2;
#endif
    return 1;
}

size_t flow_first(int64_t way, const uint8_t *data, size_t size, size_t from, const Sizes *sizes) {
    static First *const ways[] = {
        first_anywhere,
#if defined(__x86_64__)
        first_avx2,
        first_avx512,
#endif
    };
    return ways[way](data, size, from, sizes);
}

/* Cut `size` bytes, at most `most` times: lengths of chunks, whose number is returned. `way` is one of flow_cut_ways(),
 * counted from 0. */
int64_t flow_cut(const uint8_t *data, int64_t size, int64_t minimum, int64_t average, int64_t maximum, int64_t way,
                 uint32_t *lengths, int64_t most) {
    const Sizes sizes = {(size_t)minimum, (size_t)average, (size_t)maximum};
    int64_t count = 0;
    while (size > 0 && count < most) {
        const size_t length = flow_first(way, data, (size_t)size, 0, &sizes);
        lengths[count++] = (uint32_t)length;
        data += length;
        size -= (int64_t)length;
    }
    return count;
}

/* blake3 of many pieces in one call, as the BLAKE3 paper has it (O'Connor, Aumasson, Neves, Wilcox-O'Hearn, 2020).
 *
 * A piece is a tree of leaves of 1 KiB. Leaves, and the nodes of one height above them, do not depend on each other: those of
 * all pieces together fill the lanes of the processor's vectors, so that many small pieces are hashed as fast as a large one.
 * The package blake3 gives the same names one by one; flowengine/chunking/hashing.py compares before it relies on this.
 */
#include "_chunks.h"

#include <stdlib.h>

#define BLOCK 64
#define LEAF 1024
#define AHEAD 256 /* bytes that are fetched before they are asked for */
#define MOST_LANES 16
#define BATCH_LEAVES 1024 /* pieces are taken together up to this */
#define BATCH_PIECES 256
#define BLOCKS_OF_LEAF (LEAF / BLOCK)

enum { LEAF_BEGINS = 1, LEAF_ENDS = 2, PARENT = 4, ROOT = 8, CONTEXT = 32, DERIVED = 64 };

#define IV_WORDS {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19}
static const uint32_t IV[8] = IV_WORDS;

/* Which word of a block goes in where, in each of the seven rounds. */
#define ROUNDS(ROUND)                                                    \
    ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)          \
    ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)          \
    ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1)          \
    ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6)          \
    ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4)          \
    ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7)          \
    ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13)

/* Nodes that are hashed side by side, all with the same number of blocks but where `ragged`. */
typedef struct {
    const uint8_t *data[MOST_LANES];
    uint8_t *out[MOST_LANES];
    uint32_t counter[MOST_LANES];
    uint32_t length[MOST_LANES];
    uint32_t last[MOST_LANES]; /* flags of the last block besides `every` */
    uint32_t first, every;     /* flags of the first block besides `every`, and of each */
    const uint32_t *key;       /* the chaining values before the first block */
    int count;
} Group;

typedef void Run(const Group *group, int ragged);

static inline uint32_t blocks_of(uint32_t length) { return length ? (length + BLOCK - 1) / BLOCK : 1; }

/* The four columns of the state side by side, then its four diagonals: no step waits for the one before it. */
#define ADD_WORDS(x0, x1, x2, x3) v[0] += m[x0]; v[1] += m[x1]; v[2] += m[x2]; v[3] += m[x3];
#define MIX(b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3, WIDE, NARROW)                             \
    v[0] += v[b0]; v[1] += v[b1]; v[2] += v[b2]; v[3] += v[b3];                                       \
    v[d0] ^= v[0]; v[d1] ^= v[1]; v[d2] ^= v[2]; v[d3] ^= v[3];                                       \
    v[d0] = WIDE(v[d0]); v[d1] = WIDE(v[d1]); v[d2] = WIDE(v[d2]); v[d3] = WIDE(v[d3]);               \
    v[c0] += v[d0]; v[c1] += v[d1]; v[c2] += v[d2]; v[c3] += v[d3];                                   \
    v[b0] ^= v[c0]; v[b1] ^= v[c1]; v[b2] ^= v[c2]; v[b3] ^= v[c3];                                   \
    v[b0] = NARROW(v[b0]); v[b1] = NARROW(v[b1]); v[b2] = NARROW(v[b2]); v[b3] = NARROW(v[b3]);
#define COLUMNS(WIDE, NARROW) MIX(4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, WIDE, NARROW)
#define DIAGONALS(WIDE, NARROW) MIX(5, 6, 7, 4, 10, 11, 8, 9, 15, 12, 13, 14, WIDE, NARROW)
#define ROUND(a, b, c, d, e, f, g, h, i, j, k, l, n, o, p, q)                                         \
    ADD_WORDS(a, c, e, g) COLUMNS(ROT16, ROT12) ADD_WORDS(b, d, f, h) COLUMNS(ROT8, ROT7)             \
    ADD_WORDS(i, k, n, p) DIAGONALS(ROT16, ROT12) ADD_WORDS(j, l, o, q) DIAGONALS(ROT8, ROT7)

/* What becomes of the chaining values `h` with a block `m` of each lane, as the compiler makes it. */
#define BY_COMPILER(V, h, m, counter, length, flags)                                                                   \
    do {                                                                                                               \
        V v[16] = {h[0],        h[1],        h[2],        h[3],        h[4],    h[5], h[6],   h[7],                    \
                   one + IV[0], one + IV[1], one + IV[2], one + IV[3], counter, one,  length, flags};                  \
        ROUNDS(ROUND)                                                                                                  \
        for (int k = 0; k < 8; k++)                                                                                    \
            h[k] = v[k] ^ v[k + 8];                                                                                    \
    } while (0)

/* A group by vectors of LANES words; LOAD turns a block of each lane into sixteen vectors, one for each word, and COMPRESS
 * does with these what the chaining values become. */
#define RUN(NAME, TARGET, V, LANES, LOAD, COMPRESS)                                                                    \
    TARGET static inline __attribute__((always_inline)) void NAME##_body(const Group *group, const int ragged) {       \
        static const uint8_t nothing[BLOCK];                                                                           \
        uint8_t tails[LANES][BLOCK];                                                                                   \
        const uint8_t *from[LANES];                                                                                    \
        uint32_t blocks[LANES], most = 0;                                                                              \
        V counter, lengths, last, one = {0};                                                                           \
        for (int lane = 0; lane < LANES; lane++) {                                                                     \
            const int of = lane < group->count ? lane : 0;                                                             \
            const uint32_t length = group->length[of];                                                                 \
            from[lane] = group->data[of];                                                                              \
            blocks[lane] = blocks_of(length);                                                                          \
            if (blocks[lane] > most)                                                                                   \
                most = blocks[lane];                                                                                   \
            counter[lane] = group->counter[of];                                                                        \
            last[lane] = group->last[of];                                                                              \
            lengths[lane] = length - BLOCK * (blocks[lane] - 1);                                                       \
            if (ragged) {                                                                                              \
                memset(tails[lane], 0, BLOCK);                                                                         \
                memcpy(tails[lane], from[lane] + BLOCK * (blocks[lane] - 1), lengths[lane]);                           \
            }                                                                                                          \
        }                                                                                                              \
        V h[8];                                                                                                        \
        for (int k = 0; k < 8; k++)                                                                                    \
            h[k] = one + group->key[k];                                                                                \
        for (uint32_t block = 0; block < most; block++) {                                                              \
            const uint8_t *at[LANES];                                                                                  \
            V flags = one + (group->every | (block ? 0 : group->first)), length = one + BLOCK, goes_on = ~one;         \
            if (ragged)                                                                                                \
                for (int lane = 0; lane < LANES; lane++) {                                                             \
                    at[lane] = block + 1 < blocks[lane]    ? from[lane] + BLOCK * block                                \
                               : block + 1 == blocks[lane] ? tails[lane]                                               \
                                                           : nothing;                                                  \
                    goes_on[lane] = block < blocks[lane] ? ~0u : 0;                                                    \
                    if (block + 1 == blocks[lane]) {                                                                   \
                        flags[lane] |= last[lane];                                                                     \
                        length[lane] = lengths[lane];                                                                  \
                    }                                                                                                  \
                }                                                                                                      \
            else {                                                                                                     \
                for (int lane = 0; lane < LANES; lane++) {                                                             \
                    at[lane] = from[lane] + BLOCK * block;                                                             \
                    __builtin_prefetch(at[lane] + AHEAD); /* sixteen places at once are too many for the processor */  \
                }                                                                                                      \
                if (block + 1 == most)                                                                                 \
                    flags |= last;                                                                                     \
            }                                                                                                          \
            V m[16];                                                                                                   \
            LOAD(at, m);                                                                                               \
            V before[8];                                                                                               \
            if (ragged)                                                                                                \
                memcpy(before, h, sizeof h);                                                                           \
            COMPRESS(V, h, m, counter, length, flags);                                                                 \
            if (ragged)                                                                                                \
                for (int k = 0; k < 8; k++)                                                                            \
                    h[k] = (h[k] & goes_on) | (before[k] & ~goes_on);                                                  \
        }                                                                                                              \
        uint32_t words[8][LANES];                                                                                      \
        memcpy(words, h, sizeof words);                                                                                \
        for (int lane = 0; lane < group->count; lane++)                                                                \
            for (int k = 0; k < 8; k++)                                                                                \
                memcpy(group->out[lane] + 4 * k, &words[k][lane], 4);                                                  \
    }                                                                                                                  \
    TARGET static void NAME(const Group *group, int ragged) {                                                          \
        if (ragged)                                                                                                    \
            NAME##_body(group, 1);                                                                                     \
        else                                                                                                           \
            NAME##_body(group, 0);                                                                                     \
    }

/* Any processor: four lanes. */
typedef uint32_t Four __attribute__((vector_size(16)));

static inline void load_4(const uint8_t *const *at, Four *m) {
    for (int k = 0; k < 16; k++)
        m[k] = (Four){word(at[0] + 4 * k), word(at[1] + 4 * k), word(at[2] + 4 * k), word(at[3] + 4 * k)};
}

#define ROT16(x) ((x) >> 16 | (x) << 16)
#define ROT12(x) ((x) >> 12 | (x) << 20)
#define ROT8(x) ((x) >> 8 | (x) << 24)
#define ROT7(x) ((x) >> 7 | (x) << 25)
RUN(run_anywhere, , Four, 4, load_4, BY_COMPILER)

#if defined(__x86_64__)
#include <immintrin.h>

#define WITH_AVX2 __attribute__((target("avx2")))
#define WITH_AVX512 __attribute__((target("avx512f")))

typedef uint32_t Eight __attribute__((vector_size(32)));
typedef uint32_t Sixteen __attribute__((vector_size(64)));

WITH_AVX2 static inline void load_8(const uint8_t *const *at, Eight *m) {
    for (int half = 0; half < 2; half++) {
        __m256i r[8], s[8];
        for (int i = 0; i < 8; i++)
            r[i] = _mm256_loadu_si256((const void *)(at[i] + 32 * half));
        for (int i = 0; i < 8; i += 2) {
            s[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
            s[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm256_unpacklo_epi64(s[i], s[i + 2]);
            r[i + 1] = _mm256_unpackhi_epi64(s[i], s[i + 2]);
            r[i + 2] = _mm256_unpacklo_epi64(s[i + 1], s[i + 3]);
            r[i + 3] = _mm256_unpackhi_epi64(s[i + 1], s[i + 3]);
        }
        for (int k = 0; k < 4; k++) {
            m[8 * half + k] = (Eight)_mm256_permute2x128_si256(r[k], r[4 + k], 0x20);
            m[8 * half + 4 + k] = (Eight)_mm256_permute2x128_si256(r[k], r[4 + k], 0x31);
        }
    }
}

WITH_AVX512 static inline void load_16(const uint8_t *const *at, Sixteen *m) {
    /* Rows i and i + 8 side by side, first their lower halves and then their upper ones. */
    for (int half = 0; half < 2; half++) {
        __m512i r[8], s[8];
        for (int i = 0; i < 8; i++)
            r[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const void *)(at[i] + 32 * half))),
                                      _mm256_loadu_si256((const void *)(at[i + 8] + 32 * half)), 1);
        for (int i = 0; i < 8; i += 2) {
            s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
        }
        /* r[k]: word k of rows 0-3, word 4 + k of them, the same of rows 8-11; r[4 + k]: of rows 4-7 and 12-15 */
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        for (int k = 0; k < 4; k++) {
            m[8 * half + k] = (Sixteen)_mm512_permutex2var_epi64(r[k], low, r[4 + k]);
            m[8 * half + 4 + k] = (Sixteen)_mm512_permutex2var_epi64(r[k], high, r[4 + k]);
        }
    }
}

/* Eight lanes by hand: sixteen words of state and one to turn with are one more than there are registers, and a compiler
 * keeps many words in memory by turns, in the way of what waits for them. Here it is word 8 alone; register 8 is what is
 * turned with. */
#define ADD_WORD(x, a) "vpaddd 32*" #x "(%[m]), %%ymm" #a ", %%ymm" #a "\n\t"
#define ADD(from, to) "vpaddd %%ymm" #from ", %%ymm" #to ", %%ymm" #to "\n\t"
#define XOR(from, to) "vpxor %%ymm" #from ", %%ymm" #to ", %%ymm" #to "\n\t"
#define GET(at, to) "vmovdqa 32*" at ", %%ymm" #to "\n\t"
#define PUT(from, at) "vmovdqa %%ymm" #from ", 32*" at "\n\t"
#define SHUFFLE(x) "vpshufb %%ymm8, %%ymm" #x ", %%ymm" #x "\n\t"
#define SHIFT(x, right, left)                                                                                          \
    "vpsrld $" #right ", %%ymm" #x ", %%ymm8\n\t"                                                                      \
    "vpslld $" #left ", %%ymm" #x ", %%ymm" #x "\n\t"                                                                  \
    "vpor %%ymm8, %%ymm" #x ", %%ymm" #x "\n\t"
/* Half of four mixings side by side, of which the first is the one with word 8. */
#define HALF(x0, a0, b0, d0, x1, a1, b1, c1, d1, x2, a2, b2, c2, d2, x3, a3, b3, c3, d3, turn, right, left)            \
    ADD_WORD(x0, a0) ADD_WORD(x1, a1) ADD_WORD(x2, a2) ADD_WORD(x3, a3)                                                \
    ADD(b0, a0) ADD(b1, a1) ADD(b2, a2) ADD(b3, a3)                                                                    \
    XOR(a0, d0) XOR(a1, d1) XOR(a2, d2) XOR(a3, d3)                                                                    \
    GET(#turn "(%[known])", 8)                                                                                         \
    SHUFFLE(d0) SHUFFLE(d1) SHUFFLE(d2) SHUFFLE(d3)                                                                    \
    GET("0(%[eighth])", 8)                                                                                             \
    ADD(d0, 8) ADD(d1, c1) ADD(d2, c2) ADD(d3, c3)                                                                     \
    PUT(8, "0(%[eighth])")                                                                                             \
    XOR(8, b0) XOR(c1, b1) XOR(c2, b2) XOR(c3, b3)                                                                     \
    SHIFT(b0, right, left) SHIFT(b1, right, left) SHIFT(b2, right, left) SHIFT(b3, right, left)
#define COLUMNS_8(x0, x1, x2, x3, ...)                                                                                 \
    HALF(x0, 0, 4, 12, x1, 1, 5, 9, 13, x2, 2, 6, 10, 14, x3, 3, 7, 11, 15, __VA_ARGS__)
#define DIAGONALS_8(x0, x1, x2, x3, ...)                                                                               \
    HALF(x2, 2, 7, 13, x0, 0, 5, 10, 15, x1, 1, 6, 11, 12, x3, 3, 4, 9, 14, __VA_ARGS__)
#define ROUND_8(a, b, c, d, e, f, g, h, i, j, k, l, n, o, p, q)                                                        \
    COLUMNS_8(a, c, e, g, 4, 12, 20) COLUMNS_8(b, d, f, h, 5, 7, 25)                                                   \
    DIAGONALS_8(i, k, n, p, 4, 12, 20) DIAGONALS_8(j, l, o, q, 5, 7, 25)
#define EIGHT_TIMES(x) {x, x, x, x, x, x, x, x}
#define TWICE(...) {__VA_ARGS__, __VA_ARGS__}

WITH_AVX2 static inline void compress_8(Eight *h, const Eight *m, Eight counter, Eight length, Eight flags) {
    static const Eight known[6] = {
        EIGHT_TIMES(0x6A09E667), EIGHT_TIMES(0xBB67AE85), EIGHT_TIMES(0x3C6EF372), EIGHT_TIMES(0xA54FF53A),
        TWICE(0x01000302, 0x05040706, 0x09080B0A, 0x0D0C0F0E), TWICE(0x00030201, 0x04070605, 0x080B0A09, 0x0C0F0E0D),
    };
    Eight eighth = known[0];
    const Eight last[4] = {counter, counter ^ counter, length, flags};
    __asm__ volatile(
        GET("0(%[h])", 0) GET("1(%[h])", 1) GET("2(%[h])", 2) GET("3(%[h])", 3)
        GET("4(%[h])", 4) GET("5(%[h])", 5) GET("6(%[h])", 6) GET("7(%[h])", 7)
        GET("1(%[known])", 9) GET("2(%[known])", 10) GET("3(%[known])", 11)
        GET("0(%[last])", 12) GET("1(%[last])", 13) GET("2(%[last])", 14) GET("3(%[last])", 15)
        ROUNDS(ROUND_8)
        GET("0(%[eighth])", 8)
        XOR(8, 0) XOR(9, 1) XOR(10, 2) XOR(11, 3) XOR(12, 4) XOR(13, 5) XOR(14, 6) XOR(15, 7)
        PUT(0, "0(%[h])") PUT(1, "1(%[h])") PUT(2, "2(%[h])") PUT(3, "3(%[h])")
        PUT(4, "4(%[h])") PUT(5, "5(%[h])") PUT(6, "6(%[h])") PUT(7, "7(%[h])")
        :
        : [h] "r"(h), [m] "r"(m), [known] "r"(known), [eighth] "r"(&eighth), [last] "r"(last)
        : "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15");
}
#define BY_HAND(V, ...) compress_8(__VA_ARGS__)
RUN(run_avx2, WITH_AVX2, Eight, 8, load_8, BY_HAND)

#undef ROT16
#undef ROT12
#undef ROT8
#undef ROT7
#define ROT16(x) ((Sixteen)_mm512_ror_epi32((__m512i)(x), 16))
#define ROT12(x) ((Sixteen)_mm512_ror_epi32((__m512i)(x), 12))
#define ROT8(x) ((Sixteen)_mm512_ror_epi32((__m512i)(x), 8))
#define ROT7(x) ((Sixteen)_mm512_ror_epi32((__m512i)(x), 7))
RUN(run_avx512, WITH_AVX512, Sixteen, 16, load_16, BY_COMPILER)
#endif

static Run *const RUNS[] = {
    run_anywhere,
#if defined(__x86_64__)
    run_avx2,
    run_avx512,
#endif
};
static const int LANES[] = {4, 8, 16};

/* How many ways this processor has; the last is the quickest. */
int64_t flow_hash_ways(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return 3;
    if (__builtin_cpu_supports("avx2"))
        return 2;
#endif
    return 1;
}

typedef struct {
    int64_t way;
    int ragged;
    Group group;
} Queue;

static void flush(Queue *queue) {
    if (queue->group.count)
        RUNS[queue->way](&queue->group, queue->ragged);
    queue->group.count = 0;
}

static inline void push(Queue *queue, const uint8_t *data, uint32_t length, uint32_t counter, uint32_t last,
                        uint8_t *out) {
    Group *group = &queue->group;
    const int lane = group->count++;
    group->data[lane] = data;
    group->length[lane] = length;
    group->counter[lane] = counter;
    group->last[lane] = last;
    group->out[lane] = out;
    if (group->count == LANES[queue->way])
        flush(queue);
}

typedef struct {
    const uint8_t *data;
    uint8_t *out;
    uint32_t length, counter, last;
} Tail;

/* What names depend on besides the pieces: words in place of the IV, and a flag of every block. */
typedef struct {
    uint32_t words[8];
    uint32_t flag;
} Key;

typedef struct {
    size_t at; /* its nodes in the scratch memory */
    size_t nodes;
    uint8_t *out;
} Tree;

static size_t leaves_of(size_t length) { return length ? (length + LEAF - 1) / LEAF : 1; }

/* Pieces of a batch: their leaves first, then what stands above these, height by height. */
static void hash_batch(int64_t way, const Key *key, const uint8_t *data, const uint8_t *lengths, int64_t count, size_t stride,
                       uint8_t *out, size_t apart, uint8_t *nodes, uint8_t *above) {
    Tree trees[BATCH_PIECES];
    Tail tails[BATCH_PIECES];
    int64_t ended[BLOCKS_OF_LEAF + 2] = {0};
    Queue queue = {.way = way, .group = {.first = LEAF_BEGINS, .every = key->flag, .key = key->words}};
    size_t used = 0;
    for (int64_t i = 0; i < count; i++) {
        const size_t length = word(lengths + stride * (size_t)i), leaves = leaves_of(length);
        uint8_t *name = out + apart * (size_t)i;
        const uint32_t root = leaves == 1 ? ROOT : 0;
        trees[i] = (Tree){used, leaves, name};
        for (size_t leaf = 0; leaf + 1 < leaves; leaf++)
            push(&queue, data + LEAF * leaf, LEAF, (uint32_t)leaf, LEAF_ENDS, nodes + ID * (used + leaf));
        const size_t begin = LEAF * (leaves - 1);
        uint8_t *to = root ? name : nodes + ID * (used + leaves - 1);
        tails[i] = (Tail){data + begin, to, (uint32_t)(length - begin), (uint32_t)(leaves - 1), LEAF_ENDS | root};
        if (tails[i].length == LEAF)
            push(&queue, data + begin, LEAF, (uint32_t)(leaves - 1), LEAF_ENDS | root, to);
        else
            ended[blocks_of(tails[i].length)]++;
        used += leaves;
        data += length;
    }
    flush(&queue);
    /* What is shorter than a leaf goes beside what has as many blocks, or nearly. */
    int64_t order[BATCH_PIECES], places[BLOCKS_OF_LEAF + 2], ragged = 0;
    for (int blocks = 1; blocks <= BLOCKS_OF_LEAF; blocks++) {
        places[blocks] = ragged;
        ragged += ended[blocks];
    }
    for (int64_t i = 0; i < count; i++)
        if (tails[i].length != LEAF)
            order[places[blocks_of(tails[i].length)]++] = i;
    queue.ragged = 1;
    for (int64_t i = 0; i < ragged; i++) {
        const Tail *tail = &tails[order[i]];
        push(&queue, tail->data, tail->length, tail->counter, tail->last, tail->out);
    }
    flush(&queue);
    queue.ragged = 0;
    queue.group.first = 0;
    queue.group.every = PARENT | key->flag;
    for (int more = 1; more;) {
        more = 0;
        for (int64_t i = 0; i < count; i++) {
            Tree *tree = &trees[i];
            const uint8_t *from = nodes + ID * tree->at;
            uint8_t *to = above + ID * tree->at;
            if (tree->nodes < 2)
                continue;
            const size_t pairs = tree->nodes / 2, odd = tree->nodes % 2;
            if (tree->nodes == 2)
                push(&queue, from, BLOCK, 0, ROOT, tree->out);
            else
                for (size_t k = 0; k < pairs; k++)
                    push(&queue, from + BLOCK * k, BLOCK, 0, 0, to + ID * k);
            if (odd)
                memcpy(to + ID * pairs, from + BLOCK * pairs, ID);
            tree->nodes = pairs + odd;
            more |= tree->nodes > 1;
        }
        flush(&queue);
        uint8_t *swap = nodes;
        nodes = above;
        above = swap;
    }
}

static int names_under(int64_t way, const Key *key, const uint8_t *data, const uint8_t *lengths, int64_t count, size_t stride,
                       uint8_t *out, size_t apart) {
    size_t room = BATCH_LEAVES;
    for (int64_t i = 0; i < count; i++) {
        const size_t leaves = leaves_of(word(lengths + stride * (size_t)i));
        if (leaves > room)
            room = leaves;
    }
    uint8_t *memory = count ? malloc(2 * ID * room) : NULL;
    if (count && !memory)
        return -1;
    while (count) {
        int64_t taken = 0;
        size_t leaves = 0, bytes = 0;
        for (; taken < count && taken < BATCH_PIECES; taken++) {
            const size_t length = word(lengths + stride * (size_t)taken), more = leaves_of(length);
            if (leaves + more > room)
                break;
            leaves += more;
            bytes += length;
        }
        hash_batch(way, key, data, lengths, taken, stride, out, apart, memory, memory + ID * room);
        data += bytes;
        lengths += stride * (size_t)taken;
        out += apart * (size_t)taken;
        count -= taken;
    }
    free(memory);
    return 0;
}

int flow_names(int64_t way, const uint8_t *data, const uint8_t *lengths, int64_t count, size_t stride, uint8_t *out,
               size_t apart) {
    static const Key none = {IV_WORDS, 0};
    return names_under(way, &none, data, lengths, count, stride, out, apart);
}

/* The same in derive-key mode, under a context of `context_bytes`. -1: no memory. */
int64_t flow_hash_under(int64_t way, const uint8_t *context, uint32_t context_bytes, const uint8_t *data, const uint32_t *lengths,
                        int64_t count, uint8_t *names) {
    static const Key contexts = {IV_WORDS, CONTEXT};
    Key key = {.flag = DERIVED};
    if (names_under(way, &contexts, context, (const uint8_t *)&context_bytes, 1, 4, (uint8_t *)key.words, ID))
        return -1;
    return names_under(way, &key, data, (const uint8_t *)lengths, count, 4, names, ID);
}

/* The names of pieces whose lengths are given as an array. -1: no memory. */
int64_t flow_hash(int64_t way, const uint8_t *data, const uint32_t *lengths, int64_t count, uint8_t *names) {
    return flow_names(way, data, (const uint8_t *)lengths, count, 4, names, ID);
}

/* How many chunks, from the first on, have the names and lengths that the packed list says, and are whole in the data. -1: no
 * memory. */
int64_t flow_check(int64_t way, const uint8_t *data, int64_t size, const uint8_t *packed, int64_t count) {
    int64_t whole = 0;
    for (; whole < count && word(packed + PACKED * whole) <= size; whole++)
        size -= word(packed + PACKED * whole);
    uint8_t *names = whole ? malloc((size_t)(ID * whole)) : NULL;
    if (!whole)
        return 0;
    int64_t right = -1;
    if (names && !flow_names(way, data, packed, whole, PACKED, names, ID))
        for (right = 0; right < whole; right++)
            if (memcmp(names + ID * right, packed + PACKED * right + 4, ID))
                break;
    free(names);
    return right;
}

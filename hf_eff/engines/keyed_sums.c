/* base + scale * z in one pass over memory, for directions z that a key names.

   The numbers are those of hf_eff/engines/directions.py, bit for bit; what is said there holds here. Entries are those
   of one chunk; base, out and weights begin at entry `low` of it and hold `held` entries. base may be out. */

#include <math.h>
#include <stdint.h>
#include <string.h>

enum {
    WORDS = 2048,    /* 32-bit words at a time: their signs go to 32 places, each two pages long */
    DRAWN = 1 << 15, /* 64-bit words at a time, of four entries each */
    ALONE = 1 << 15  /* entries that are not worth a second thread */
};

static inline float from_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t to_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float widen_f32(float number) { return number; }
static inline float narrow_f32(float number) { return number; }
static inline float widen_bf16(uint16_t half) { return from_bits((uint32_t)half << 16); }

static inline uint16_t narrow_bf16(float number)
{
    uint32_t bits = to_bits(number);
    uint16_t rounded = (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16); /* to nearest, ties to even */
    return number != number ? 0x7FC0u : rounded;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* SplitMix64: output i of the stream of a key, from 0. */
static inline uint64_t random_word(uint64_t key, int64_t i)
{
    uint64_t word = key + (uint64_t)(i + 1) * 0x9E3779B97F4A7C15ull;
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
    return word ^ (word >> 31);
}

/* 32-bit words `first` to `first + count` of a stream, the lower half of each 64-bit word first; both even. */
static void random_halves(uint32_t *words, uint64_t key, int64_t first, int64_t count)
{
    for (int64_t i = 0; i < count / 2; i++) {
        uint64_t word = random_word(key, first / 2 + i);
        words[2 * i] = (uint32_t)word;
        words[2 * i + 1] = (uint32_t)(word >> 32);
    }
}

/* SFC64 (Doty-Humphrey), as numpy has it: the next words of a state. */
static void sfc64(uint64_t state[4], uint64_t *words, int64_t count)
{
    uint64_t a = state[0], b = state[1], c = state[2], counter = state[3];
    for (int64_t i = 0; i < count; i++) {
        uint64_t word = a + b + counter++;
        a = b ^ (b >> 11);
        b = c + (c << 3);
        c = ((c << 24) | (c >> 40)) + word;
        words[i] = word;
    }
    state[0] = a, state[1] = b, state[2] = c, state[3] = counter;
}

/* Entry k * num_words + j has bit 31 - k of word j as its sign. */
#define ADD_SIGNS(TYPE, NUMBER)                                                                                      \
    void add_signs_##TYPE(NUMBER *out, const NUMBER *base, int64_t low, int64_t held, uint64_t key,                  \
                          int64_t num_words, float scale)                                                            \
    {                                                                                                                \
        const uint32_t size = to_bits(scale);                                                                        \
        _Pragma("omp parallel for schedule(static) if (held > ALONE)")                                               \
        for (int64_t first = 0; first < num_words; first += WORDS) {                                                 \
            uint32_t words[WORDS];                                                                                   \
            const int64_t count = least(WORDS, num_words - first);                                                   \
            random_halves(words, key, first, count);                                                                 \
            for (int shift = 0; shift < 32; shift++) {                                                               \
                const int64_t begin = shift * num_words + first - low; /* of word `first`, among the entries held */ \
                const int64_t from = most(0, -begin), stop = least(count, held - begin);                             \
                _Pragma("omp simd")                                                                                  \
                for (int64_t i = from; i < stop; i++) {                                                              \
                    const float step = from_bits(size ^ ((words[i] << shift) & 0x80000000u));                        \
                    out[begin + i] = narrow_##TYPE(widen_##TYPE(base[begin + i]) + step);                            \
                }                                                                                                    \
            }                                                                                                        \
        }                                                                                                            \
    }

/* Entry i is table[32768 + the i-th 16 bits of the stream], or 0 where |weight| > limit. */
#define ADD_QUANTILES(TYPE, NUMBER)                                                                                  \
    void add_quantiles_##TYPE(NUMBER *out, const NUMBER *base, const NUMBER *weights, int64_t low, int64_t held,     \
                              uint64_t *state, const float *table, float scale, float limit)                         \
    {                                                                                                                \
        static _Thread_local uint64_t words[DRAWN];                                                                  \
        for (int64_t first = 0; first < low + held; first += 4 * DRAWN) {                                            \
            const int64_t count = least(4 * DRAWN, low + held - first);                                              \
            const int64_t begin = first - low, from = most(0, -begin);                                               \
            sfc64(state, words, (count + 3) / 4);                                                                    \
            const int16_t *drawn = (const int16_t *)words;                                                           \
            _Pragma("omp parallel for simd schedule(static) if (count - from > ALONE)")                              \
            for (int64_t i = from; i < count; i++) {                                                                 \
                const float entry = table[32768 + (int32_t)drawn[i]];                                                \
                const float kept = fabsf(widen_##TYPE(weights[begin + i])) > limit ? 0.0f : entry;                   \
                out[begin + i] = narrow_##TYPE(fmaf(scale, kept, widen_##TYPE(base[begin + i])));                    \
            }                                                                                                        \
        }                                                                                                            \
    }

ADD_SIGNS(f32, float)
ADD_SIGNS(bf16, uint16_t)
ADD_QUANTILES(f32, float)
ADD_QUANTILES(bf16, uint16_t)

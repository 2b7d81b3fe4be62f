/* A whole FFN in tiers: the gate's first plane, the choice of channels, and their up rows and down columns. */
#include "operators.h"
#include "planes.h"

#include <omp.h>
#if defined(__AVX512F__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

enum { SILU, GELU_TANH, GELU, RELU, RELU2 };

/* g[i] becomes act(g[i]); i from `from` to `to` */
static void activate(float *g, int64_t from, int64_t to, int activation) {
    switch (activation) {
    case SILU:
        for (int64_t i = from; i < to; i++) g[i] = g[i] / (1 + exponential(-g[i]));
        break;
    case GELU_TANH:
        for (int64_t i = from; i < to; i++)
            g[i] = g[i] / (1 + exponential(-1.5957691216f * (g[i] + 0.044715f * g[i] * g[i] * g[i])));
        break;
    case GELU:
        for (int64_t i = from; i < to; i++) g[i] = 0.5f * g[i] * (1 + erff(g[i] * 0.70710678f));
        break;
    case RELU2:
        for (int64_t i = from; i < to; i++) g[i] = g[i] < 0 ? 0 : g[i] * g[i]; /* of no number: none */
        break;
    default:
        for (int64_t i = from; i < to; i++) g[i] = g[i] < 0 ? 0 : g[i];
    }
}

typedef struct {
    int64_t n, all;
    const int64_t *bits, *count;
} tiers;

#define MOST_TIERS 3
#define BUCKETS 2048 /* of the highest 12 bits of a score's number, whose sign is not set */

/* to[i] = the numbers of `key` in a bucket, how many there are */
static int64_t members(const uint32_t *key, int64_t n, uint32_t bucket, uint32_t *to) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
    for (; i + 16 <= n; i += 16) {
        const __m512i own = _mm512_loadu_si512(key + i);
        const __mmask16 in = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(own, 20), _mm512_set1_epi32((int)bucket));
        _mm512_mask_compressstoreu_epi32(to + found, in, own);
        found += __builtin_popcount(in);
    }
#endif
    for (; i < n; i++) {
        to[found] = key[i];
        found += key[i] >> 20 == bucket;
    }
    return found;
}

/* appends the places of the numbers from `least` to below `below`; where the list ends */
static int64_t *places(const uint32_t *key, int64_t n, uint32_t least, uint32_t below, int64_t *to) {
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512VL__)
    __m512i place = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    for (; i + 8 <= n; i += 8) {
        const __m256i own = _mm256_loadu_si256((const __m256i *)(key + i));
        const __mmask8 in = _mm256_mask_cmplt_epu32_mask(_mm256_cmpge_epu32_mask(own, _mm256_set1_epi32((int)least)), own,
                                                         _mm256_set1_epi32((int)below));
        _mm512_mask_compressstoreu_epi64(to, in, place);
        to += __builtin_popcount(in);
        place = _mm512_add_epi64(place, _mm512_set1_epi64(8));
    }
#endif
    for (; i < n; i++)
        if (key[i] >= least && key[i] < below) *to++ = i;
    return to;
}

/* Channels of each tier, the best first, rising within one, ties to the lower: index[all].
 *
 * key[i]: the bits of score i, which is not negative. work: memory for d_ff. */
static void assign(const uint32_t *key, int64_t d_ff, tiers of, int64_t *index, uint32_t *work) {
    if (of.n == 1 && of.all == d_ff) { /* nothing to choose */
        for (int64_t i = 0; i < d_ff; i++) index[i] = i;
        return;
    }
    int32_t count[BUCKETS] = {0};
    for (int64_t i = 0; i < d_ff; i++) count[key[i] >> 20]++;
    uint32_t least[MOST_TIERS] = {0}; /* a tier takes what is above its least number, */
    int64_t ties[MOST_TIERS] = {0};   /* and so many of those that have just this */
    int64_t bucket = BUCKETS - 1, above = 0, wanted = 0, shared = 0;
    for (int64_t tier = 0; tier < of.n; tier++) {
        wanted += of.count[tier];
        if (!wanted || (tier && !of.count[tier])) {
            least[tier] = tier ? least[tier - 1] : UINT32_MAX, ties[tier] = 0;
            continue;
        }
        while (above + count[bucket] < wanted) above += count[bucket--];
        const int64_t inside = members(key, d_ff, (uint32_t)bucket, work);
        least[tier] = kth_highest(work, inside, wanted - above - 1);
        ties[tier] = wanted - above;
        int64_t same = 0;
        for (int64_t i = 0; i < inside; i++) ties[tier] -= work[i] > least[tier], same += work[i] == least[tier];
        shared |= same != ties[tier];                     /* equal numbers in two tiers, or read and unread */
        for (int64_t t = 0; t < tier; t++) ties[tier] -= least[t] == least[tier] ? ties[t] : 0; /* taken by better tiers */
    }
    if (!shared) {
        uint32_t below = UINT32_MAX;
        for (int64_t tier = 0; tier < of.n; tier++) {
            if (of.count[tier]) index = places(key, d_ff, least[tier], below, index);
            below = least[tier];
        }
        return;
    }
    int64_t *to[MOST_TIERS + 1], unread = 0;
    for (int64_t tier = 0; tier < of.n; index += of.count[tier++]) to[tier] = index;
    to[of.n] = &unread;
    for (int64_t i = 0; i < d_ff; i++) {
        int64_t tier = 0;
        for (int64_t t = 0; t < of.n; t++) tier += key[i] < least[t];
        while (tier < of.n && key[i] == least[tier] && !ties[tier]) tier++;
        if (tier < of.n && key[i] == least[tier]) ties[tier]--;
        *to[tier] = i;
        to[tier] += tier < of.n;
    }
}

/* memory for the tokens that choose together */
typedef struct {
    rounded *x;            /* [m] */
    float *values;         /* [m, d_ff] of the gate's first plane, activated */
    float *h, *gates;      /* [m, K] */
    float *added;          /* [PARTS, m, d] */
    double *sums;          /* [m, threads] */
    uint32_t *key, *work;  /* [d_ff] */
} memory;

static void free_memory(memory *own, int64_t m) {
    free_rounded(own->x, m);
    free(own->values), free(own->sums);
}

static int new_memory(int64_t d, int64_t group, int64_t d_ff, int64_t m, int threads, memory *own) {
    own->x = new_rounded_all(d, group, m);
    own->values = malloc(((3 * m + 2) * d_ff + PARTS * m * d) * sizeof(float));
    own->sums = malloc(m * threads * sizeof(double));
    if (!own->x || !own->values || !own->sums) {
        free_memory(own, m);
        return 0;
    }
    own->h = own->values + m * d_ff, own->gates = own->h + m * d_ff;
    own->key = (uint32_t *)(own->gates + m * d_ff), own->work = own->key + d_ff;
    own->added = (float *)(own->work + d_ff);
    return 1;
}

/* y[n, d] of x[n, d]; index[n, K]: the channels read, the best tier first, rising within each.
 *
 * up is NULL where h is the activated gate alone. Rows of token t begin at first[t]; rms, norm and biases (or NULL) are
 * of all rows. Tier i reads count[i] channels in read[i] bits. Each token chooses by its scores; with votes[n] all choose together, and read the same rows: by the sum of
 * their scores' squares, each token's of sum votes[t]. Returns -1, or OUT_OF_MEMORY, or the place of a wrong `first`.
 */
int64_t tiers_ffn(const void *const *gate, const void *const *up, const void *const *down, int64_t n_rows, int64_t d,
                  int64_t group, int64_t d_ff, const float *rms, const float *norm, const float *gate_bias,
                  const float *up_bias, int activation, int64_t n_tiers, const int64_t *read, const int64_t *count,
                  const int64_t *first, const float *votes, int64_t n, const float *x, float *y, int64_t *index, int threads) {
    const int plain = (int)read[0] & PLAIN;
    const planes g = {gate[0], gate[1], gate[2], gate[3], n_rows, d, group, plain};
    const planes u = up ? (planes){up[0], up[1], up[2], up[3], n_rows, d, group, plain} : g;
    const planes w = {down[0], down[1], down[2], down[3], n_rows, d, group, plain};
    int64_t bits[MOST_TIERS];
    for (int64_t i = 0; i < n_tiers; i++) bits[i] = number_of((int)read[i]);
    const int64_t outside = first_outside(first, n, n_rows - d_ff + 1);
    if (outside >= 0) return outside;
    tiers of = {n_tiers, 0, bits, count};
    for (int64_t i = 0; i < n_tiers; i++) of.all += count[i];
    const int base = base_bits((int)bits[0]);
    const int most = g.fine ? 8 : base; /* bits of the gate's rows: those of one plane are read once */
    const int chooses = !(of.n == 1 && of.all == d_ff);
    const int64_t m = votes ? n : 1;
    memory own;
    if (!n) return -1;
    if (!new_memory(d, group, d_ff, m, threads, &own)) return OUT_OF_MEMORY;
    for (int64_t t0 = 0; t0 < n; t0 += m, index += m * of.all) {
        const int64_t from = first[t0];
        for (int64_t t = 0; t < m; t++) round_vector(x + (t0 + t) * d, d, group, own.x + t);
#pragma omp parallel num_threads(threads)
        {
            const part whose = {omp_get_thread_num(), omp_get_num_threads()};
            const range own_rows = share(d_ff, 4, whose);
            const int64_t low = own_rows.from, high = own_rows.to;
            if (chooses || bits[0] == base || most == base) {
                rows_dot(&g, base, from, NULL, d_ff, own.x, m, own.values, d_ff, own_rows);
                for (int64_t t = 0; t < m; t++) {
                    float *const values = own.values + t * d_ff;
                    if (gate_bias)
                        for (int64_t i = low; i < high; i++) values[i] += gate_bias[from + i];
                    activate(values, low, high, activation);
                }
            }
            for (int64_t t = 0; chooses && m > 1 && t < m; t++) {
                double sum = 0;
                for (int64_t i = low; i < high; i++) {
                    const float score = own.values[t * d_ff + i] * rms[from + i] * norm[from + i];
                    sum += (double)score * score;
                }
                own.sums[t * whose.all + whose.me] = sum;
            }
            if (chooses && m > 1) {
#pragma omp barrier
#pragma omp single
                for (int64_t t = 0; t < m; t++)
                    for (int64_t other = 1; other < whose.all; other++)
                        own.sums[t * whose.all] += own.sums[t * whose.all + other];
            }
            for (int64_t i = low; chooses && i < high; i++) {
                float score = fabsf(own.values[i] * rms[from + i]) * norm[from + i];
                if (m > 1) {
                    score = 0;
                    for (int64_t t = 0; t < m; t++) {
                        const float one = own.values[t * d_ff + i] * rms[from + i] * norm[from + i];
                        const double sum = own.sums[t * whose.all];
                        if (sum > 0) score += (float)(votes[t] * ((double)one * one / sum));
                    }
                }
                memcpy(own.key + i, &score, 4);
                own.key[i] &= 0x7fffffff;
            }
#pragma omp barrier
#pragma omp single
            assign(own.key, d_ff, of, index, own.work);
            for (int64_t i = 0, at = 0; i < n_tiers; at += count[i++]) {
                const range ours = share(count[i], 4, whose);
                const int64_t *const mine = index + at;
                if (up) rows_dot(&u, (int)bits[i], from, mine, count[i], own.x, m, own.h + at, d_ff, ours);
                if (bits[i] > base && most > base)
                    rows_dot(&g, (int)bits[i], from, mine, count[i], own.x, m, own.gates + at, d_ff, ours);
                for (int64_t t = 0; t < m; t++) {
                    float *const h = own.h + t * d_ff + at, *const gates = own.gates + t * d_ff + at;
                    const float *const values = own.values + t * d_ff;
                    if (bits[i] > base && most > base) {
                        if (gate_bias)
                            for (int64_t j = ours.from; j < ours.to; j++) gates[j] += gate_bias[from + mine[j]];
                        activate(gates, ours.from, ours.to, activation);
                    }
                    for (int64_t j = ours.from; j < ours.to; j++) {
                        const float factor = up ? h[j] + (up_bias ? up_bias[from + mine[j]] : 0) : 1;
                        h[j] = (bits[i] == base || most == base ? values[mine[j]] : gates[j]) * factor;
                    }
                }
            }
#pragma omp barrier
            tiers_add(&w, n_tiers, bits, count, from, index, own.h, d_ff, m, own.added, y + t0 * d, whose);
        }
        for (int64_t t = 1; t < m; t++) memcpy(index + t * of.all, index, of.all * sizeof(int64_t));
    }
    free_memory(&own, m);
    return -1;
}

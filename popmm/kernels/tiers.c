/* A whole FFN in tiers: the gate's first plane, the choice of channels, and their up rows and down columns. */
#include "planes.h"

#include <omp.h>

void choose(const float *score, int64_t n, int64_t u, int64_t k, uint32_t *work, int64_t *index); /* rows.c */

enum { SILU, GELU_TANH, GELU, RELU };

static inline float activated(float g, int activation) {
    switch (activation) {
    case SILU: return g / (1 + expf(-g));
    case GELU_TANH: return g / (1 + expf(-1.5957691216f * (g + 0.044715f * g * g * g)));
    case GELU: return 0.5f * g * (1 + erff(g * 0.70710678f));
    default: return g > 0 ? g : 0;
    }
}

typedef struct {
    int64_t n, all;
    const int64_t *bits, *count;
} tiers;

/* Channels of each tier, the best first, rising within one: index[all]. left, place, work: memory for d_ff each; h too. */
static void assign(const float *score, int64_t d_ff, tiers of, int64_t *index, float *h, int64_t *left, int64_t *place,
                   uint32_t *work) {
    if (of.n == 1 && of.all == d_ff) { /* nothing to choose */
        for (int64_t i = 0; i < d_ff; i++) index[i] = i;
        return;
    }
    /* from the last tier to the first: the best of what is left belong to those before it */
    choose(score, 1, d_ff, of.all, work, left);
    int64_t kept = of.all;
    for (int64_t i = of.n - 1; i >= 0; i--) {
        const int64_t better = kept - of.count[i];
        int64_t *tier = index + better, filled = 0, next = 0;
        for (int64_t j = 0; j < kept; j++) h[j] = score[left[j]];
        if (better) choose(h, 1, kept, better, work, place);
        for (int64_t j = 0, m = 0; j < kept; j++) {
            if (m < better && place[m] == j) left[next++] = left[j], m++;
            else tier[filled++] = left[j];
        }
        kept = better;
    }
}

/* y[n, d] of x[n, d]; index[n, K]: the channels read, the best tier first, rising within each.
 *
 * Rows of token t begin at first[t]; rms, norm and biases (or NULL) are of all rows. Tier i reads count[i] channels in
 * bits[i] bits. Returns -1, or OUT_OF_MEMORY.
 */
int64_t tiers_ffn(const void *const *gate, const void *const *up, const void *const *down, int64_t n_rows, int64_t d,
                  int64_t group, int64_t d_ff, const float *rms, const float *norm, const float *gate_bias,
                  const float *up_bias, int activation, int64_t n_tiers, const int64_t *bits, const int64_t *count,
                  const int64_t *first, int64_t n, const float *x, float *y, int64_t *index, int threads) {
    const planes g = {gate[0], gate[1], gate[2], gate[3], n_rows, d, group};
    const planes u = {up[0], up[1], up[2], up[3], n_rows, d, group};
    const planes w = {down[0], down[1], down[2], down[3], n_rows, d, group};
    const int64_t outside = first_outside(first, n, n_rows - d_ff + 1);
    if (outside >= 0) return outside;
    tiers of = {n_tiers, 0, bits, count};
    for (int64_t i = 0; i < n_tiers; i++) of.all += count[i];
    const int base = base_bits((int)bits[0]);
    const int chooses = !(of.n == 1 && of.all == d_ff);
    rounded own;
    float *const values = malloc((4 * d_ff) * sizeof(float)), *const score = values + d_ff, *const h = values + 2 * d_ff;
    float *const gates = values + 3 * d_ff;
    int64_t *const place = malloc(2 * d_ff * sizeof(int64_t)), *const left = place + d_ff;
    uint32_t *const work = malloc(d_ff * sizeof(uint32_t));
    if (!values || !place || !work || !new_rounded(d, group, &own)) {
        free(values), free(place), free(work);
        return OUT_OF_MEMORY;
    }
    memset(y, 0, n * d * sizeof(float));
    for (int64_t t = 0; t < n; t++, index += of.all) {
        const int64_t from = first[t];
        round_vector(x + t * d, d, group, &own);
#pragma omp parallel num_threads(threads)
        {
            const part whose = {omp_get_thread_num(), omp_get_num_threads()};
            if (chooses || bits[0] == base) {
                rows_dot(&g, base, from, NULL, d_ff, &own, values, whose);
#pragma omp barrier
            }
            if (chooses) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < d_ff; i++) {
                    if (gate_bias) values[i] += gate_bias[from + i];
                    score[i] = fabsf(activated(values[i], activation) * rms[from + i]) * norm[from + i];
                }
            } else if (gate_bias && bits[0] == base) {
#pragma omp for schedule(static)
                for (int64_t i = 0; i < d_ff; i++) values[i] += gate_bias[from + i];
            }
#pragma omp single
            assign(score, d_ff, of, index, h, left, place, work);
            for (int64_t i = 0, at = 0; i < n_tiers; at += count[i++]) {
                const int64_t *tier = index + at;
                rows_dot(&u, (int)bits[i], from, tier, count[i], &own, h + at, whose);
                if (bits[i] > base) rows_dot(&g, (int)bits[i], from, tier, count[i], &own, gates + at, whose);
            }
#pragma omp barrier
            for (int64_t i = 0, at = 0; i < n_tiers; at += count[i++]) {
#pragma omp for schedule(static) nowait
                for (int64_t j = at; j < at + count[i]; j++) {
                    const int64_t row = from + index[j];
                    const float value = bits[i] == base ? values[index[j]] : gates[j] + (gate_bias ? gate_bias[row] : 0);
                    h[j] = activated(value, activation) * (h[j] + (up_bias ? up_bias[row] : 0));
                }
            }
#pragma omp barrier
            for (int64_t i = 0, at = 0; i < n_tiers; at += count[i++])
                if (count[i]) rows_add(&w, (int)bits[i], from, index + at, h + at, count[i], y + t * d, whose);
        }
    }
    free(own.code), free(values), free(place), free(work);
    return -1;
}

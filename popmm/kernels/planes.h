/* Rows in nested planes (planes.py says how they are coded), as planes.c and tiers.c share them. */
#include "common.h"

#include <math.h>
#include <stdlib.h>

/* Row r of d weights: `base` d / 2 bytes (3 bits: 3 d / 8), `fine` and `finest` d / 4 each, `scale` d / group float16.
 * An odd number of bits is of planes whose first has 3 bits, an even one of those whose first has 4. */
typedef struct {
    const uint8_t *base, *fine, *finest;
    const uint16_t *scale;
    int64_t n_rows, d, group;
    int plain; /* rounded for the bits that are read alone */
} planes;

/* `bits` as they are handed over: with PLAIN added of rows that were rounded for them alone */
#define PLAIN 16
static inline int number_of(int bits) { return bits & ~PLAIN; }

static const float MIDDLE[9] = {[3] = 4.0f, [4] = 8.0f, [5] = 17.5f, [6] = 33.5f, [7] = 71.5f, [8] = 135.5f};
static inline float middle_of(const planes *p, int bits) { return p->plain ? (float)(1 << (bits - 1)) : MIDDLE[bits]; }
static inline int base_bits(int bits) { return bits & 1 ? 3 : 4; }
static inline int cells(int bits) { return 1 << (bits - base_bits(bits)); } /* of a base code that these bits tell */
static inline const uint8_t *base_of(const planes *p, int64_t row, int bits, int64_t g) {
    return p->base + (uint64_t)(row * p->d + g * p->group) / 8 * base_bits(bits);
}
static inline const uint8_t *pairs_of(const uint8_t *plane, const planes *p, int64_t row, int64_t g) {
    return plane + (uint64_t)(row * p->d + g * p->group) / 4;
}

/* the value of weight i of a group as its number in so many bits */
static inline int number(const planes *p, int64_t row, int bits, int64_t g, int64_t i) {
    const int64_t half = p->group / 2, quarter = p->group / 4, at = i % quarter;
    const uint8_t *base = base_of(p, row, bits, g);
    const int shift = 2 * (int)(i / quarter);
    int u;
    if (bits & 1) u = (base[at] >> shift & 3) << 1 | (base[quarter + i / 8] >> (i % 8) & 1);
    else u = i < half ? base[i] & 15 : base[i - half] >> 4;
    if (bits >= 5 && bits != 4) u = u << 2 | (pairs_of(p->fine, p, row, g)[at] >> shift & 3);
    if (bits >= 7) u = u << 2 | (pairs_of(p->finest, p, row, g)[at] >> shift & 3);
    return u;
}

/* a vector in 8 bits per group */
typedef struct {
    int8_t *code;  /* [d] */
    float *step;   /* [groups], padded to a multiple of 16 */
    float *total;  /* [groups]: the sum of a group's rounded values */
} rounded;

/* memory for one; 0 = there is none. To be freed: code */
int new_rounded(int64_t d, int64_t group, rounded *x);
rounded *new_rounded_all(int64_t d, int64_t group, int64_t n); /* n of them, NULL if there is no memory */
void free_rounded(rounded *x, int64_t n);
void round_vector(const float *x, int64_t d, int64_t group, rounded *to);

/* one thread of a team, by its number */
typedef struct {
    int64_t me, all;
} part;

typedef struct {
    int64_t from, to;
} range;

/* a thread's own of n things, in whole steps */
static inline range share(int64_t n, int64_t step, part whose) {
    const int64_t each = ((n + whose.all - 1) / whose.all + step - 1) / step * step, from = whose.me * each;
    return (range){from < n ? from : n, from + each < n ? from + each : n};
}

/* out[t * stride + j] = row[index[j]] . x[t] for the j of a range of k and m vectors; index NULL: rows first, first + 1, ... */
void rows_dot(const planes *p, int bits, int64_t first, const int64_t *index, int64_t k, const rounded *x, int64_t m, float *out,
              int64_t stride, range own);

#define TILE 16 /* rows whose factors are rounded together, as many as 16-bit sums of nibbles hold: no part divides them */
#define PARTS 2 /* of rows, whose sums are added in their order: the result does not depend on the number of threads */

/* Of m tokens y[t, d] = sum over tiers i, and their channels j, of h[t * stride + j] * row[index[j]], whose bits[i] are read;
 * index and h hold the count[i] of one tier after those of another. Called by all threads of a team, of which each has written
 * its own columns of y when it returns. sums: memory for [PARTS, m, d]. */
void tiers_add(const planes *p, int64_t n_tiers, const int64_t *bits, const int64_t *count, int64_t first, const int64_t *index,
               const float *h, int64_t stride, int64_t m, float *sums, float *y, part whose);

/* how many rows later those come whose lines are fetched meanwhile: so many bytes, whatever the rows' length */
static inline int64_t ahead(const planes *p) { return p->d >= 2048 ? 8 : 12288 / p->d; }

#define OUT_OF_MEMORY INT64_MAX

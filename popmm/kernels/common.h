/* What the C kernels share. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define SIXTEEN 1 /* floats at a time */
#endif

/* float16, finite; by no denormal float, which a process may have set to count as zero */
static inline float from_half(uint16_t h) {
    const uint32_t size = h & 0x7fff, bits = (size << 13) + (112u << 23);
    float f;
    memcpy(&f, &bits, 4);
    f = size < 0x400 ? (float)(int32_t)size * 0x1p-24f : f;
    return h & 0x8000 ? -f : f;
}

/* e^x by 2^n * e^r, to a relative 2e-7, in plain arithmetic so that compilers can do several at once */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = nearbyintf(x * 1.44269504f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.0f / 720;
    e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6, e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return e * power;
}

/* place of the first index that names nothing, -1 if all name something */
static inline int64_t first_outside(const int64_t *index, int64_t n, int64_t end) {
    int64_t outside = 0;
    for (int64_t i = 0; i < n; i++) outside |= (uint64_t)index[i] >= (uint64_t)end;
    for (int64_t i = 0; outside && i < n; i++)
        if ((uint64_t)index[i] >= (uint64_t)end) return i;
    return -1;
}

/* the k-th highest of the n numbers in v, whose order changes; k counts from 0 */
static inline uint32_t kth_highest(uint32_t *v, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    while (low < high) { /* Hoare's selection */
        const uint32_t pivot = v[low + (high - low) / 2];
        int64_t i = low - 1, j = high + 1;
        for (;;) {
            do i++; while (v[i] > pivot);
            do j--; while (v[j] < pivot);
            if (i >= j) break;
            const uint32_t swap = v[i];
            v[i] = v[j], v[j] = swap;
        }
        if (k <= j) high = j;
        else low = j + 1;
    }
    return v[k];
}

#ifdef SIXTEEN
/* the sums of four registers */
static inline __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

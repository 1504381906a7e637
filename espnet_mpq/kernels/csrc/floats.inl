// The float parts of every path, on vectors of MPQ_LANES floats; included once by each path.
//
// Operations and their order do not depend on MPQ_LANES (sums always run in kSumLanes lanes) and nothing is
// fused (-ffp-contract=off) but what calls fused, so that all paths give the same floats.
#if MPQ_LANES >= 8
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif
#include <cmath>
#include <cstring>

namespace {

using mpq::kBlockRows;

typedef float vf __attribute__((vector_size(MPQ_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(MPQ_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(MPQ_LANES * 2)));
typedef int8_t vb __attribute__((vector_size(MPQ_LANES)));
constexpr int kLanes = MPQ_LANES;
constexpr int kSumLanes = 16;    // of the widest vectors; another number is another rounding
constexpr int kSumParts = kSumLanes / kLanes;
constexpr int kBlockParts = kBlockRows / kLanes;    // a block of rows in vectors

inline vf splat(float x) { return vf{} + x; }

template <class V, class T>
inline V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
inline V load_some(const T* p, int64_t n) {
    if (n >= kLanes) return load<V>(p);
    V v{};
    std::memcpy(&v, p, n * 4);
    return v;
}

template <class V, class T>
inline void store_some(T* p, V v, int64_t n) {
    if (n >= kLanes)
        std::memcpy(p, &v, sizeof v);
    else
        std::memcpy(p, &v, n * 4);
}

// fused: a * b + c, rounded once. at_least, at_most: NaN of x stays. scaled: p * 2^n of whole n, normal.
#if MPQ_LANES == 16
inline vf fused(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf at_least(vf x, float least) { return _mm512_max_ps(_mm512_set1_ps(least), x); }
inline vf at_most(vf x, float most) { return _mm512_min_ps(_mm512_set1_ps(most), x); }
inline vf scaled(vf p, vf n) { return _mm512_scalef_ps(p, n); }
#else
#if MPQ_LANES == 8
inline vf fused(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__ARM_NEON)
inline vf fused(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
#else
inline vf fused(vf a, vf b, vf c) {
    for (int i = 0; i < kLanes; ++i) c[i] = std::fmaf(a[i], b[i], c[i]);
    return c;
}
#endif
inline vf at_least(vf x, float least) { return x < splat(least) ? splat(least) : x; }
inline vf at_most(vf x, float most) { return x > splat(most) ? splat(most) : x; }
inline vf scaled(vf p, vf n) {
    const vf made = (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
    return p == p ? made : p;    // the shift would make a number of some NaNs
}
#endif

// Adding 1.5 * 2^23 leaves no fraction bits: round half to even for |x| < 2^22.
inline vf round_even(vf x) {
    const vf magic = splat(12582912.0f);
    return (x + magic) - magic;
}

// exp to about 2 ulp for x up to `most` <= 88: 2^n times a polynomial (coefficients of Cephes' expf).
// NaN stays NaN.
inline vf exp_v(vf x, float most = 88.0f) {
    x = at_most(at_least(x, -87.3f), most);
    const vf magic = splat(12582912.0f);
    const vf n = fused(x, splat(1.44269504088896341f), magic) - magic;
    const vf r = fused(n, splat(2.12194440e-4f), fused(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fused(p, r, splat(1.3981999507e-3f));
    p = fused(p, r, splat(8.3334519073e-3f));
    p = fused(p, r, splat(4.1665795894e-2f));
    p = fused(p, r, splat(1.6666665459e-1f));
    p = fused(p, r, splat(5.0000001201e-1f));
    return scaled(fused(p, r * r, r) + splat(1.0f), n);
}

// 1 / (1 + exp(-x)) and tanh(x) times it in one division. tanh is 1 beyond 20: no overflow.
inline vf times_sigmoid(vf y, vf x) { return y / (splat(1.0f) + exp_v(-x)); }
inline vf tanh_times_sigmoid(vf y, vf x) {
    const vf e = exp_v(splat(-2.0f) * y, 40.0f), one = splat(1.0f);
    return (one - e) / ((one + e) * (one + exp_v(-x)));
}

float quantize(const float* x, int64_t cols, int8_t* q) {
    // Magnitudes compared as integers: NaN is above infinity and so reaches the scale.
    vi top[kSumParts] = {};
    for (int64_t k = 0; k < cols; k += kSumLanes)
        for (int j = 0; j < kSumParts && k + j * kLanes < cols; ++j) {
            const int64_t at = k + j * kLanes;
            const vi bits = load_some<vi>(x + at, cols - at) & 0x7fffffff;
            top[j] = bits > top[j] ? bits : top[j];
        }
    int32_t most = 0;
    for (int j = 0; j < kSumParts; ++j)
        for (int i = 0; i < kLanes; ++i) most = top[j][i] > most ? top[j][i] : most;
    float scale;
    std::memcpy(&scale, &most, 4);
    scale = scale / 127.0f;
    if (!(scale > 0.0f && scale <= 3.4028235e38f)) {
        std::memset(q, 0, cols);
        return scale;
    }
    for (int64_t k = 0; k < cols; k += kLanes) {
        vf r = round_even(load_some<vf>(x + k, cols - k) / scale);
        // Only a subnormal scale can leave the range.
        r = at_least(at_most(r, 127.0f), -127.0f);
        const vb bytes = __builtin_convertvector(__builtin_convertvector(r, vi), vb);
        std::memcpy(q + k, &bytes, cols - k < kLanes ? cols - k : kLanes);
    }
    return scale;
}

// (sum + v) + bias at k
inline void finish(vf v, const float* sum, const float* bias, int k, int n, float* out) {
    if (sum) v = load<vf>(sum + k) + v;
    if (bias) v = v + load<vf>(bias + k);
    store_some(out + k, v, n - k);
}

void dequantize(const int32_t* y, float x_scale, const float* scales, const float* sum, const float* bias,
                int n, float* out) {
    for (int k = 0; k < n; k += kLanes) {
        const vf scale = splat(x_scale) * load<vf>(scales + k);
        finish(__builtin_convertvector(load<vi>(y + k), vf) * scale, sum, bias, k, n, out);
    }
}

void add(const float* y, const float* sum, const float* bias, int n, float* out) {
    for (int k = 0; k < n; k += kLanes) finish(load<vf>(y + k), sum, bias, k, n, out);
}

inline vf load_weights(const float* p) { return load<vf>(p); }

// Halves are finite: subnormal ones are exact as (2^-14 + fraction) - 2^-14.
inline vf load_weights(const uint16_t* p) {
    const vi half = __builtin_convertvector(load<vh>(p), vi);
    const vi magnitude = half & 0x7fff;
    const vf normal = (vf)((magnitude << 13) + (112 << 23));
    const vf subnormal = (vf)((magnitude << 13) | 0x38800000) - splat(6.103515625e-05f);
    return (vf)((vi)(magnitude < 0x400 ? subnormal : normal) | (half & 0x8000) << 16);
}

// One sum a row, column after column: the same on vectors of any length.
template <class T, int NB>
void float_block(const T* w, const float* x, int64_t cols, float* y, int stride) {
    vf acc[NB][kBlockParts] = {};
    for (int64_t k = 0; k < cols; ++k, w += kBlockRows)
        for (int j = 0; j < kBlockParts; ++j) {
            const vf weight = load_weights(w + j * kLanes);
            for (int b = 0; b < NB; ++b) acc[b][j] = acc[b][j] + weight * splat(x[b * cols + k]);
        }
    for (int b = 0; b < NB; ++b) std::memcpy(y + b * stride, acc[b], sizeof acc[b]);
}

template <class T>
void float_product_of(const mpq::Matrix& w, const float* x, int batch, int first_block, int n_blocks,
                      float* y) {
    const int stride = n_blocks * kBlockRows;
    for (int i = 0; i < n_blocks; ++i) {
        const T* block = static_cast<const T*>(w.floats) + (first_block + i) * w.cols * kBlockRows;
        int b = 0;
        for (; b + 4 <= batch; b += 4)
            float_block<T, 4>(block, x + b * w.cols, w.cols, y + b * stride + i * kBlockRows, stride);
        for (; b < batch; ++b)
            float_block<T, 1>(block, x + b * w.cols, w.cols, y + b * stride + i * kBlockRows, stride);
    }
}

void float_product(const mpq::Matrix& w, const float* x, int batch, int first_block, int n_blocks,
                   float* y) {
    (w.bits == 16 ? float_product_of<uint16_t> : float_product_of<float>)(w, x, batch, first_block,
                                                                          n_blocks, y);
}

void cell(const float* const* gates, const float* const* bias, int n, const float* c_in, float* c_out,
          float* h_out) {
    for (int k = 0; k < n; k += kLanes) {
        vf gate[4];
        for (int g = 0; g < 4; ++g) gate[g] = load<vf>(gates[g] + k) + load<vf>(bias[g] + k);
        const vf kept = times_sigmoid(load_some<vf>(c_in + k, n - k), gate[1]);
        const vf c = kept + tanh_times_sigmoid(gate[2], gate[0]);
        store_some(c_out + k, c, n - k);
        store_some(h_out + k, tanh_times_sigmoid(c, gate[3]), n - k);
    }
}

void log_softmax(float* x, int64_t n) {
    const int64_t whole = n / kSumLanes * kSumLanes;
    vf top[kSumParts], sums[kSumParts];
    for (int j = 0; j < kSumParts; ++j) {
        top[j] = splat(x[0]);
        sums[j] = splat(0.0f);
    }
    for (int64_t k = 0; k < whole; k += kSumLanes)
        for (int j = 0; j < kSumParts; ++j) {
            const vf v = load<vf>(x + k + j * kLanes);
            top[j] = v > top[j] ? v : top[j];
        }
    float most = x[0];
    for (int j = 0; j < kSumParts; ++j)
        for (int i = 0; i < kLanes; ++i) most = top[j][i] > most ? top[j][i] : most;
    for (int64_t k = whole; k < n; ++k) most = x[k] > most ? x[k] : most;
    for (int64_t k = 0; k < whole; k += kSumLanes)
        for (int j = 0; j < kSumParts; ++j)
            sums[j] = sums[j] + exp_v(load<vf>(x + k + j * kLanes) - splat(most));
    float sum = 0.0f;
    for (int j = 0; j < kSumParts; ++j)
        for (int i = 0; i < kLanes; ++i) sum += sums[j][i];
    for (int64_t k = whole; k < n; ++k) sum += exp_v(splat(x[k]) - splat(most))[0];
    const float log_sum = most + std::log(sum);
    for (int64_t k = 0; k < n; k += kLanes)
        store_some(x + k, load_some<vf>(x + k, n - k) - splat(log_sum), n - k);
}

}  // namespace

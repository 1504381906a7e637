// Matrices: from the file's layout into the kernels' and back.
#include <algorithm>
#include <cstring>
#include <new>

#include "api.h"
#include "products.h"
#include "threads.h"

#if defined(MPQ_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

using mpq::Matrix;
using mpq::Path;
using mpq::Weights;

namespace mpq {

#ifdef MPQ_ARM64
static bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1 << 20;    // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
    return true;    // every 64-bit Mac
#else
    return false;
#endif
}
#endif

const Path* find_path(int path) {
    if (path == 0) return &kScalar;
#ifdef MPQ_X86
    __builtin_cpu_init();
    if (path == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni");
    if (path == 2 && has_avx512) return &kAvx512;
    if (path == 3 && has_avx512 && __builtin_cpu_supports("avx512vbmi")) {
        static const Path with_tables = avx512_with_tables();
        return &with_tables;
    }
#endif
#ifdef MPQ_ARM64
    if (path == 4) return has_dot_products() ? &kNeonDot : &kNeon;
#endif
    return nullptr;
}

}  // namespace mpq

MPQ_API int mpq_abi_version() { return 3; }

MPQ_API int mpq_has_path(int path) { return mpq::find_path(path) != nullptr; }

MPQ_API int mpq_n_workers() { return mpq::n_workers(); }

namespace {

bool are_levels(int bits, const int8_t* levels, int n_levels) {
    if ((bits != 1 && bits != 2 && bits != 4 && bits != 8) || n_levels < 1 || n_levels > 1 << bits)
        return false;
    for (int i = 1; i < n_levels; ++i)
        if (levels[i] <= levels[i - 1] || (bits == 8 && levels[i] != levels[0] + i)) return false;
    return true;
}

void fill_tables(Matrix* m, const int8_t* levels, int n_levels) {
    const int bits = m->bits;
    const int least = *std::min_element(levels, levels + n_levels);
    const int most = *std::max_element(levels, levels + n_levels);
    m->min_level = least;
    m->max_u = bits == 8 ? 255 : most - least;
    m->step = n_levels > 1 ? levels[1] - levels[0] : 0;
    for (int i = 2; i < n_levels; ++i)
        if (levels[i] - levels[i - 1] != m->step) m->step = 0;
    if (bits == 8) return;
    for (int i = 0; i < n_levels; ++i) m->u_of_code[i] = uint8_t(levels[i] - least);
    for (int t = 0; t < 4 / bits; ++t)
        for (int i = 0; i < 16; ++i)
            m->tables[t][i] = m->u_of_code[(i >> (t * bits)) & ((1 << bits) - 1)];
}

int code_at(const uint8_t* row, int64_t col, int bits) {
    return (row[col * bits / 8] >> (col * bits % 8)) & ((1 << bits) - 1);
}

// Columns first_col ... of rows of `row_n_bytes` bytes.
void fill_packs(Matrix* m, const uint8_t* codes, int64_t row_n_bytes, int64_t first_col) {
    const int bits = m->bits, per_pack = 8 / bits;
    for (int64_t row = 0; row < m->rows; ++row) {
        const uint8_t* from = codes + row * row_n_bytes;
        uint8_t* block = m->packs + size_t(row / 16) * m->n_packs * 64 + row % 16 * 4;
        for (int64_t col = 0; col < m->cols; ++col) {
            const int64_t group = col / 4;
            block[group / per_pack * 64 + col % 4] |=
                uint8_t(code_at(from, first_col + col, bits) << (group % per_pack * bits));
        }
    }
}

size_t packs_n_bytes(const Matrix& m) { return size_t(m.n_blocks) * m.n_packs * 64; }

size_t floats_n_bytes(const Weights& w) { return size_t(w.n_blocks) * 16 * w.cols * (w.bits / 8); }

bool fill_group(Matrix* m, const Weights& w, int group, const uint8_t* codes, const int8_t* levels,
                int n_levels, const float* scales, int64_t scale_rows) {
    const int64_t first_col = group * w.group_size;
    m->rows = w.rows;
    m->cols = std::min(w.group_size, w.cols - first_col);
    m->bits = w.bits;
    m->n_blocks = w.n_blocks;
    m->n_packs = int((m->cols * m->bits + 31) / 32);    // 32 bits of a row
    const size_t n_bytes = packs_n_bytes(*m);
    m->packs = static_cast<uint8_t*>(mpq::weights_new(n_bytes));
    m->scales = static_cast<float*>(mpq::aligned_new(size_t(m->n_blocks) * 64));
    if (!m->packs || !m->scales) return false;
    std::memset(m->packs, 0, n_bytes);
    for (int64_t i = 0; i < m->n_blocks * 16; ++i)
        m->scales[i] = i < m->rows ? scales[(scale_rows == 1 ? 0 : i) * w.n_groups + group] : 0.0f;
    fill_tables(m, levels, n_levels);
    fill_packs(m, codes, (w.cols * w.bits + 7) / 8, first_col);
    return true;
}

Weights* new_weights(int64_t rows, int64_t cols, int bits) {
    if (rows < 1 || rows > INT32_MAX / 16 || cols < 1 || cols > mpq::kMaxCols) return nullptr;
    Weights* w = new (std::nothrow) Weights();
    if (!w) return nullptr;
    w->rows = rows;
    w->cols = w->group_size = cols;
    w->bits = bits;
    w->n_blocks = int((rows + 15) / 16);
    return w;
}

template <class T>
void fill_floats(Weights* w, const T* from) {
    T* to = static_cast<T*>(w->floats);
    for (int64_t row = 0; row < w->n_blocks * 16; ++row)
        for (int64_t col = 0; col < w->cols; ++col)
            to[(row / 16 * w->cols + col) * 16 + row % 16] =
                row < w->rows ? from[row * w->cols + col] : T(0);
}

template <class T>
void floats_of_row(const Weights& w, int64_t row, T* out) {
    const T* from = static_cast<const T*>(w.floats) + row / 16 * w.cols * 16 + row % 16;
    for (int64_t col = 0; col < w.cols; ++col) out[col] = from[col * 16];
}

float half_to_float(uint16_t half) {
    const int sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
    const float value = exponent ? float(fraction + 1024) : float(fraction);
    // 2^(exponent - 25), of subnormal ones 2^-24
    float power;
    const uint32_t bits = uint32_t((exponent ? exponent : 1) + 102) << 23;
    std::memcpy(&power, &bits, 4);
    return sign ? -value * power : value * power;
}

}  // namespace

MPQ_API Weights* mpq_codes_new(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                               const int8_t* levels, int n_levels, const float* scales,
                               int64_t scale_rows, int64_t group_size) {
    if (!are_levels(bits, levels, n_levels) || (scale_rows != 1 && scale_rows != rows)) return nullptr;
    if (group_size < 1 || group_size > cols) return nullptr;
    Weights* w = new_weights(rows, cols, bits);
    if (!w) return nullptr;
    w->group_size = group_size;
    const int n_groups = int((cols + group_size - 1) / group_size);
    w->groups = new (std::nothrow) Matrix[n_groups]();
    bool good = w->groups != nullptr;
    w->n_groups = good ? n_groups : 0;
    for (int g = 0; good && g < n_groups; ++g)
        good = fill_group(w->groups + g, *w, g, codes, levels, n_levels, scales, scale_rows);
    if (good) return w;
    mpq_weights_free(w);
    return nullptr;
}

MPQ_API Weights* mpq_floats_new(const void* values, int64_t rows, int64_t cols, int bits) {
    if (bits != 16 && bits != 32) return nullptr;
    Weights* w = new_weights(rows, cols, bits);
    if (!w) return nullptr;
    w->floats = mpq::weights_new(floats_n_bytes(*w));
    if (!w->floats) {
        mpq_weights_free(w);
        return nullptr;
    }
    if (bits == 16)
        fill_floats(w, static_cast<const uint16_t*>(values));
    else
        fill_floats(w, static_cast<const float*>(values));
    return w;
}

MPQ_API void mpq_weights_free(Weights* w) {
    if (!w) return;
    for (int g = 0; g < w->n_groups; ++g) {
        mpq::weights_delete(w->groups[g].packs, packs_n_bytes(w->groups[g]));
        mpq::aligned_delete(w->groups[g].scales);
    }
    delete[] w->groups;
    mpq::weights_delete(w->floats, floats_n_bytes(*w));
    delete w;
}

MPQ_API int64_t mpq_weights_n_bytes(const Weights* w) {
    int64_t n_bytes = sizeof(Weights) + w->n_groups * int64_t(sizeof(Matrix));
    for (int g = 0; g < w->n_groups; ++g)
        n_bytes += packs_n_bytes(w->groups[g]) + int64_t(w->n_blocks) * 64;
    return n_bytes + (w->floats ? floats_n_bytes(*w) : 0);
}

MPQ_API int mpq_weights_stored(const Weights* w, void* stored) {
    if (w->bits >= 16) {
        for (int64_t row = 0; row < w->rows; ++row)
            if (w->bits == 16)
                floats_of_row(*w, row, static_cast<uint16_t*>(stored) + row * w->cols);
            else
                floats_of_row(*w, row, static_cast<float*>(stored) + row * w->cols);
        return 0;
    }
    const int64_t row_n_bytes = (w->cols * w->bits + 7) / 8;
    uint8_t* codes = new (std::nothrow) uint8_t[w->cols];
    if (!codes) return -3;
    std::memset(stored, 0, size_t(w->rows * row_n_bytes));
    for (int64_t row = 0; row < w->rows; ++row) {
        uint8_t* to = static_cast<uint8_t*>(stored) + row * row_n_bytes;
        for (int g = 0; g < w->n_groups; ++g)
            mpq::codes_of_row(w->groups[g], row, codes + g * w->group_size);
        for (int64_t col = 0; col < w->cols; ++col)
            to[col * w->bits / 8] |= uint8_t(codes[col] << (col * w->bits % 8));
    }
    delete[] codes;
    return 0;
}

MPQ_API int mpq_weights_rows(const Weights* w, const int64_t* rows, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i)
        if (rows[i] < 0 || rows[i] >= w->rows) return -4;
    for (int64_t i = 0; i < n; ++i) mpq::float_row(*w, rows[i], out + i * w->cols);
    return 0;
}

namespace mpq {

template <int BITS>
static void codes_of(const Matrix& m, const uint8_t* from, uint8_t* codes) {
    constexpr int kMask = (1 << BITS) - 1;
    for (int64_t col = 0; col < m.cols; from += 64)
        for (int shift = 0; shift < 8; shift += BITS, col += 4) {
            if (col + 4 <= m.cols)
                for (int j = 0; j < 4; ++j) codes[col + j] = (from[j] >> shift) & kMask;
            else
                for (int j = 0; col + j < m.cols; ++j) codes[col + j] = (from[j] >> shift) & kMask;
        }
}

void codes_of_row(const Matrix& m, int64_t row, uint8_t* codes) {
    const uint8_t* from = m.packs + size_t(row / 16) * m.n_packs * 64 + row % 16 * 4;
    if (m.bits == 1) return codes_of<1>(m, from, codes);
    if (m.bits == 2) return codes_of<2>(m, from, codes);
    if (m.bits == 4) return codes_of<4>(m, from, codes);
    codes_of<8>(m, from, codes);
}

void float_row(const Weights& w, int64_t row, float* out) {
    if (w.bits == 32) return floats_of_row(w, row, out);
    if (w.bits == 16) {
        const uint16_t* from = static_cast<const uint16_t*>(w.floats) + row / 16 * w.cols * 16 + row % 16;
        for (int64_t col = 0; col < w.cols; ++col) out[col] = half_to_float(from[col * 16]);
        return;
    }
    uint8_t codes[kMaxCols];
    for (int g = 0; g < w.n_groups; ++g) {
        const Matrix& m = w.groups[g];
        codes_of_row(m, row, codes);
        for (int64_t col = 0; col < m.cols; ++col)
            out[g * w.group_size + col] = m.scales[row] * float(level_of(m, codes[col]));
    }
}

}  // namespace mpq

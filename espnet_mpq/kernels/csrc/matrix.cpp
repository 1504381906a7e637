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

using mpq::ColumnGroup;
using mpq::kBlockRows;
using mpq::kNibbles;
using mpq::kPackBytes;
using mpq::kQuadCols;
using mpq::Matrix;
using mpq::Path;

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
    if (path == kPathScalar) return &kScalar;
#ifdef MPQ_X86
    __builtin_cpu_init();
    if (path == kPathAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kAvx2;
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni");
    if (path == kPathAvx512 && has_avx512) return &kAvx512;
    if (path == kPathAvx512Vbmi && has_avx512 && __builtin_cpu_supports("avx512vbmi")) {
        static const Path with_tables = avx512_with_tables();
        return &with_tables;
    }
#endif
#ifdef MPQ_ARM64
    if (path == kPathNeon) return has_dot_products() ? &kNeonDot : &kNeon;
#endif
    return nullptr;
}

}  // namespace mpq

MPQ_API int mpq_abi_version() { return 4; }

MPQ_API int64_t mpq_max_cols() { return mpq::kMaxCols; }

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

void fill_tables(ColumnGroup* group, const int8_t* levels, int n_levels) {
    const int bits = group->bits;
    const int least = *std::min_element(levels, levels + n_levels);
    const int most = *std::max_element(levels, levels + n_levels);
    group->min_level = least;
    group->max_u = bits == 8 ? 255 : most - least;
    group->step = n_levels > 1 ? levels[1] - levels[0] : 0;
    for (int i = 2; i < n_levels; ++i)
        if (levels[i] - levels[i - 1] != group->step) group->step = 0;
    if (bits == 8) return;
    for (int i = 0; i < n_levels; ++i) group->u_of_code[i] = uint8_t(levels[i] - least);
    for (int t = 0; t < 4 / bits; ++t)
        for (int i = 0; i < kNibbles; ++i)
            group->tables[t][i] = group->u_of_code[(i >> (t * bits)) & ((1 << bits) - 1)];
}

int code_at(const uint8_t* row, int64_t col, int bits) {
    return (row[col * bits / 8] >> (col * bits % 8)) & ((1 << bits) - 1);
}

// Where the first byte of a row stands in the packs of a group: kQuadCols bytes of every pack of its block.
size_t start_of_row(const ColumnGroup& group, int64_t row) {
    const size_t block_n_bytes = size_t(group.n_packs) * kPackBytes;
    return size_t(row / kBlockRows) * block_n_bytes + row % kBlockRows * kQuadCols;
}

// Columns first_col ... of rows of `row_n_bytes` bytes.
void fill_packs(ColumnGroup* group, const uint8_t* codes, int64_t row_n_bytes, int64_t first_col) {
    const int bits = group->bits, per_pack = 8 / bits;
    for (int64_t row = 0; row < group->rows; ++row) {
        const uint8_t* from = codes + row * row_n_bytes;
        uint8_t* to = group->packs + start_of_row(*group, row);
        for (int64_t col = 0; col < group->cols; ++col) {
            const int64_t quad = col / kQuadCols;
            to[quad / per_pack * kPackBytes + col % kQuadCols] |=
                uint8_t(code_at(from, first_col + col, bits) << (quad % per_pack * bits));
        }
    }
}

size_t packs_n_bytes(const ColumnGroup& group) { return size_t(group.n_blocks) * group.n_packs * kPackBytes; }

size_t scales_n_bytes(const ColumnGroup& group) { return size_t(group.n_blocks) * kBlockRows * sizeof(float); }

size_t floats_n_bytes(const Matrix& w) { return size_t(w.n_blocks) * kBlockRows * w.cols * (w.bits / 8); }

bool fill_group(ColumnGroup* group, const Matrix& w, int g, const uint8_t* codes, const int8_t* levels,
                int n_levels, const float* scales, int64_t scale_rows) {
    const int64_t first_col = g * w.group_size;
    group->rows = w.rows;
    group->cols = std::min(w.group_size, w.cols - first_col);
    group->bits = w.bits;
    group->n_blocks = w.n_blocks;
    constexpr int kRowBits = 8 * kQuadCols;    // of a row in one pack
    group->n_packs = int((group->cols * group->bits + kRowBits - 1) / kRowBits);
    const size_t n_bytes = packs_n_bytes(*group);
    group->packs = static_cast<uint8_t*>(mpq::weights_new(n_bytes));
    group->scales = static_cast<float*>(mpq::aligned_new(scales_n_bytes(*group)));
    if (!group->packs || !group->scales) return false;
    std::memset(group->packs, 0, n_bytes);
    for (int64_t i = 0; i < group->n_blocks * kBlockRows; ++i)
        group->scales[i] = i < group->rows ? scales[(scale_rows == 1 ? 0 : i) * w.n_groups + g] : 0.0f;
    fill_tables(group, levels, n_levels);
    fill_packs(group, codes, (w.cols * w.bits + 7) / 8, first_col);
    return true;
}

Matrix* new_weights(int64_t rows, int64_t cols, int bits) {
    if (rows < 1 || rows > INT32_MAX / kBlockRows || cols < 1 || cols > mpq::kMaxCols) return nullptr;
    Matrix* w = new (std::nothrow) Matrix();
    if (!w) return nullptr;
    w->rows = rows;
    w->cols = w->group_size = cols;
    w->bits = bits;
    w->n_blocks = int(mpq::padded_rows(rows) / kBlockRows);
    return w;
}

template <class T>
void fill_floats(Matrix* w, const T* from) {
    T* to = static_cast<T*>(w->floats);
    for (int64_t row = 0; row < w->n_blocks * kBlockRows; ++row)
        for (int64_t col = 0; col < w->cols; ++col)
            to[(row / kBlockRows * w->cols + col) * kBlockRows + row % kBlockRows] =
                row < w->rows ? from[row * w->cols + col] : T(0);
}

// The first number of a row; the others stand kBlockRows apart.
template <class T>
const T* floats_at_row(const Matrix& w, int64_t row) {
    return static_cast<const T*>(w.floats) + row / kBlockRows * w.cols * kBlockRows + row % kBlockRows;
}

template <class T>
void floats_of_row(const Matrix& w, int64_t row, T* out) {
    const T* from = floats_at_row<T>(w, row);
    for (int64_t col = 0; col < w.cols; ++col) out[col] = from[col * kBlockRows];
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

MPQ_API Matrix* mpq_matrix_of_codes(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                               const int8_t* levels, int n_levels, const float* scales,
                               int64_t scale_rows, int64_t group_size) {
    if (!are_levels(bits, levels, n_levels) || (scale_rows != 1 && scale_rows != rows)) return nullptr;
    if (group_size < 1 || group_size > cols) return nullptr;
    Matrix* w = new_weights(rows, cols, bits);
    if (!w) return nullptr;
    w->group_size = group_size;
    const int n_groups = int((cols + group_size - 1) / group_size);
    w->groups = new (std::nothrow) ColumnGroup[n_groups]();
    bool good = w->groups != nullptr;
    w->n_groups = good ? n_groups : 0;
    for (int g = 0; good && g < n_groups; ++g)
        good = fill_group(w->groups + g, *w, g, codes, levels, n_levels, scales, scale_rows);
    if (good) return w;
    mpq_matrix_free(w);
    return nullptr;
}

MPQ_API Matrix* mpq_matrix_of_floats(const void* values, int64_t rows, int64_t cols, int bits) {
    if (bits != 16 && bits != 32) return nullptr;
    Matrix* w = new_weights(rows, cols, bits);
    if (!w) return nullptr;
    w->floats = mpq::weights_new(floats_n_bytes(*w));
    if (!w->floats) {
        mpq_matrix_free(w);
        return nullptr;
    }
    if (bits == 16)
        fill_floats(w, static_cast<const uint16_t*>(values));
    else
        fill_floats(w, static_cast<const float*>(values));
    return w;
}

MPQ_API void mpq_matrix_free(Matrix* w) {
    if (!w) return;
    for (int g = 0; g < w->n_groups; ++g) {
        mpq::weights_delete(w->groups[g].packs, packs_n_bytes(w->groups[g]));
        mpq::aligned_delete(w->groups[g].scales);
    }
    delete[] w->groups;
    mpq::weights_delete(w->floats, floats_n_bytes(*w));
    delete w;
}

MPQ_API int64_t mpq_matrix_n_bytes(const Matrix* w) {
    int64_t n_bytes = sizeof(Matrix) + w->n_groups * int64_t(sizeof(ColumnGroup));
    for (int g = 0; g < w->n_groups; ++g)
        n_bytes += packs_n_bytes(w->groups[g]) + scales_n_bytes(w->groups[g]);
    return n_bytes + (w->floats ? floats_n_bytes(*w) : 0);
}

MPQ_API int mpq_matrix_stored(const Matrix* w, void* stored) {
    if (w->bits >= 16) {
        for (int64_t row = 0; row < w->rows; ++row)
            if (w->bits == 16)
                floats_of_row(*w, row, static_cast<uint16_t*>(stored) + row * w->cols);
            else
                floats_of_row(*w, row, static_cast<float*>(stored) + row * w->cols);
        return mpq::kOk;
    }
    const int64_t row_n_bytes = (w->cols * w->bits + 7) / 8;
    uint8_t* codes = new (std::nothrow) uint8_t[w->cols];
    if (!codes) return mpq::kNoMemory;
    std::memset(stored, 0, size_t(w->rows * row_n_bytes));
    for (int64_t row = 0; row < w->rows; ++row) {
        uint8_t* to = static_cast<uint8_t*>(stored) + row * row_n_bytes;
        for (int g = 0; g < w->n_groups; ++g)
            mpq::codes_of_row(w->groups[g], row, codes + g * w->group_size);
        for (int64_t col = 0; col < w->cols; ++col)
            to[col * w->bits / 8] |= uint8_t(codes[col] << (col * w->bits % 8));
    }
    delete[] codes;
    return mpq::kOk;
}

MPQ_API int mpq_matrix_rows(const Matrix* w, const int64_t* rows, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i)
        if (rows[i] < 0 || rows[i] >= w->rows) return mpq::kNoSuchRow;
    for (int64_t i = 0; i < n; ++i) mpq::float_row(*w, rows[i], out + i * w->cols);
    return mpq::kOk;
}

namespace mpq {

template <int BITS>
static void codes_of(const ColumnGroup& group, const uint8_t* from, uint8_t* codes) {
    constexpr int kMask = (1 << BITS) - 1;
    for (int64_t col = 0; col < group.cols; from += kPackBytes)
        for (int shift = 0; shift < 8; shift += BITS, col += kQuadCols) {
            if (col + kQuadCols <= group.cols)
                for (int j = 0; j < kQuadCols; ++j) codes[col + j] = (from[j] >> shift) & kMask;
            else
                for (int j = 0; col + j < group.cols; ++j) codes[col + j] = (from[j] >> shift) & kMask;
        }
}

void codes_of_row(const ColumnGroup& group, int64_t row, uint8_t* codes) {
    const uint8_t* from = group.packs + start_of_row(group, row);
    if (group.bits == 1) return codes_of<1>(group, from, codes);
    if (group.bits == 2) return codes_of<2>(group, from, codes);
    if (group.bits == 4) return codes_of<4>(group, from, codes);
    codes_of<8>(group, from, codes);
}

void float_row(const Matrix& w, int64_t row, float* out) {
    if (w.bits == 32) return floats_of_row(w, row, out);
    if (w.bits == 16) {
        const uint16_t* from = floats_at_row<uint16_t>(w, row);
        for (int64_t col = 0; col < w.cols; ++col) out[col] = half_to_float(from[col * kBlockRows]);
        return;
    }
    uint8_t codes[kMaxCols];
    for (int g = 0; g < w.n_groups; ++g) {
        const ColumnGroup& group = w.groups[g];
        codes_of_row(group, row, codes);
        for (int64_t col = 0; col < group.cols; ++col)
            out[g * w.group_size + col] = group.scales[row] * float(level_of(group, codes[col]));
    }
}

}  // namespace mpq

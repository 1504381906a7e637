// Packed matrices: from the file's layout into the kernels', and products of plain arrays.
#include <cstring>
#include <new>

#include "api.h"
#include "kernels.h"

using mpq::Matrix;
using mpq::Path;

namespace mpq {

const Path* find_path(int path) {
    if (path == 0) return &kScalar;
#ifdef MPQ_X86
    __builtin_cpu_init();
    if (path == 1 && __builtin_cpu_supports("avx2")) return &kAvx2;
    if (path == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        return &kAvx512;
#endif
    return nullptr;
}

}  // namespace mpq

static bool are_levels(int bits, const int8_t* levels, int n_levels) {
    if ((bits != 1 && bits != 2 && bits != 4 && bits != 8) || n_levels < 1 || n_levels > 1 << bits)
        return false;
    if (bits == 8)
        for (int i = 0; i < n_levels; ++i)
            if (levels[i] != levels[0] + i) return false;
    return true;
}

MPQ_API int mpq_abi_version() { return 1; }

MPQ_API int mpq_has_path(int path) { return mpq::find_path(path) != nullptr; }

static void fill_tables(Matrix* m, int bits, const int8_t* levels, int n_levels) {
    int least = levels[0], most = levels[0];
    for (int i = 1; i < n_levels; ++i) {
        least = levels[i] < least ? levels[i] : least;
        most = levels[i] > most ? levels[i] : most;
    }
    m->min_level = least;
    m->max_u = bits == 8 ? 255 : most - least;
    std::memset(m->u_of_code, 0, sizeof m->u_of_code);
    if (bits == 8) return;
    for (int i = 0; i < n_levels; ++i) m->u_of_code[i] = uint8_t(levels[i] - least);
    for (int t = 0; t < 4 / bits; ++t)
        for (int i = 0; i < 16; ++i)
            m->tables[t][i] = m->u_of_code[(i >> (t * bits)) & ((1 << bits) - 1)];
}

static void fill_packs(Matrix* m, const uint8_t* codes) {
    const int bits = m->bits, per_pack = 8 / bits, mask = (1 << bits) - 1;
    const int64_t row_n_bytes = (m->cols * bits + 7) / 8;
    for (int64_t row = 0; row < m->rows; ++row) {
        const uint8_t* from = codes + row * row_n_bytes;
        uint8_t* block = m->packs + size_t(row / 16) * m->n_packs * 64 + row % 16 * 4;
        for (int64_t col = 0; col < m->cols; ++col) {
            const int code = (from[col * bits / 8] >> (col * bits % 8)) & mask;
            const int64_t group = col / 4;
            block[group / per_pack * 64 + col % 4] |= uint8_t(code << (group % per_pack * bits));
        }
    }
}

MPQ_API Matrix* mpq_matrix_new(const uint8_t* codes, int64_t rows, int64_t cols, int bits,
                               const int8_t* levels, int n_levels, const float* scales,
                               int64_t n_scales) {
    if (rows < 1 || rows > INT32_MAX / 16 || cols < 1 || cols > mpq::kMaxCols) return nullptr;
    if (!are_levels(bits, levels, n_levels) || (n_scales != 1 && n_scales != rows)) return nullptr;
    Matrix* m = new (std::nothrow) Matrix();
    if (!m) return nullptr;
    m->rows = rows;
    m->cols = cols;
    m->bits = bits;
    m->n_blocks = int((rows + 15) / 16);
    m->n_packs = mpq::padded_cols(cols) / 4 * bits / 8;
    const size_t n_bytes = size_t(m->n_blocks) * m->n_packs * 64;
    m->packs = static_cast<uint8_t*>(mpq::aligned_new(n_bytes));
    m->scales = static_cast<float*>(mpq::aligned_new(size_t(m->n_blocks) * 64));
    if (!m->packs || !m->scales) {
        mpq_matrix_free(m);
        return nullptr;
    }
    std::memset(m->packs, 0, n_bytes);
    for (int64_t i = 0; i < m->n_blocks * 16; ++i)
        m->scales[i] = i < rows ? scales[n_scales == 1 ? 0 : i] : 0.0f;
    fill_tables(m, bits, levels, n_levels);
    fill_packs(m, codes);
    return m;
}

MPQ_API void mpq_matrix_free(Matrix* m) {
    if (!m) return;
    mpq::aligned_delete(m->packs);
    mpq::aligned_delete(m->scales);
    delete m;
}

MPQ_API int64_t mpq_matrix_n_bytes(const Matrix* m) {
    return int64_t(m->n_blocks) * (int64_t(m->n_packs) * 64 + 64) + int64_t(sizeof(Matrix));
}

MPQ_API int mpq_quantize(const float* x, int64_t batch, int64_t cols, int8_t* q, float* scales,
                         int path) {
    const Path* p = mpq::find_path(path);
    if (!p) return -2;
    for (int64_t b = 0; b < batch; ++b) scales[b] = p->quantize(x + b * cols, cols, q + b * cols);
    return 0;
}

// Calls done(first row of the batch, rows of it, first row of the matrix, rows of it, y, stride).
template <class Rows, class Done>
static int for_chunks(const Matrix& m, const Path& p, int64_t batch, const Rows& rows,
                      const Done& done) {
    const size_t most = batch < mpq::kMaxBatch ? batch : mpq::kMaxBatch;
    const size_t x_size = mpq::Arena::padded(most * mpq::padded_cols(m.cols));
    const size_t sum_size = mpq::Arena::padded(most * 4);
    const size_t y_size = most * mpq::kChunkBlocks * 16 * 4;
    mpq::Arena& arena = mpq::thread_arena();
    if (!arena.reserve(2 * x_size + sum_size + y_size)) return -3;
    int8_t* q = static_cast<int8_t*>(arena.take(x_size));
    int8_t* x = static_cast<int8_t*>(arena.take(x_size));
    int32_t* sums = static_cast<int32_t*>(arena.take(sum_size));
    int32_t* y = static_cast<int32_t*>(arena.take(y_size));
    for (int64_t first = 0; first < batch; first += mpq::kMaxBatch) {
        const int n = int(batch - first < mpq::kMaxBatch ? batch - first : mpq::kMaxBatch);
        mpq::interleave(rows(first, n, q), m.cols, m.cols, n, x, sums);
        for (int block = 0; block < m.n_blocks; block += mpq::kChunkBlocks) {
            const int left = m.n_blocks - block;
            const int n_blocks = left < mpq::kChunkBlocks ? left : mpq::kChunkBlocks;
            p.product(m, x, sums, n, block, n_blocks, y);
            const int64_t row = int64_t(block) * 16;
            const int64_t n_rows = m.rows - row < n_blocks * 16 ? m.rows - row : n_blocks * 16;
            done(first, n, row, int(n_rows), y, n_blocks * 16);
        }
    }
    return 0;
}

MPQ_API int mpq_product(const Matrix* m, const int8_t* x, int64_t batch, int32_t* y, int path) {
    const Path* p = mpq::find_path(path);
    if (!p) return -2;
    if (!m || batch < 0) return -1;
    return for_chunks(
        *m, *p, batch, [&](int64_t first, int, int8_t*) { return x + first * m->cols; },
        [&](int64_t first, int n, int64_t row, int n_rows, const int32_t* from, int stride) {
            for (int b = 0; b < n; ++b)
                std::memcpy(y + (first + b) * m->rows + row, from + b * stride, size_t(n_rows) * 4);
        });
}

MPQ_API int mpq_linear(const Matrix* m, const float* x, int64_t batch, const float* bias, float* y,
                       int path) {
    const Path* p = mpq::find_path(path);
    if (!p) return -2;
    if (!m || batch < 0) return -1;
    float scales[mpq::kMaxBatch];
    return for_chunks(
        *m, *p, batch,
        [&](int64_t first, int n, int8_t* q) -> const int8_t* {
            for (int b = 0; b < n; ++b)
                scales[b] = p->quantize(x + (first + b) * m->cols, m->cols, q + b * m->cols);
            return q;
        },
        [&](int64_t first, int n, int64_t row, int n_rows, const int32_t* from, int stride) {
            // The caller's bias is not padded, so a copy is.
            alignas(64) float padded[mpq::kChunkBlocks * 16] = {};
            if (bias) std::memcpy(padded, bias + row, size_t(n_rows) * 4);
            for (int b = 0; b < n; ++b)
                p->dequantize(from + b * stride, scales[b], m->scales + row, bias ? padded : nullptr,
                              n_rows, y + (first + b) * m->rows + row);
        });
}

// Activations in the forms that matrices ask for, and products with them.
#include <algorithm>
#include <cassert>
#include <cstring>

#include "api.h"
#include "products.h"
#include "threads.h"

using mpq::Arena;
using mpq::Input;
using mpq::ColumnGroup;
using mpq::kBlockRows;
using mpq::kPadCols;
using mpq::Matrix;
using mpq::Path;

namespace mpq {

size_t Input::form_n_bytes(const Matrix& w, int batch) {
    if (!w.n_groups) return 0;
    const size_t x = size_t(w.n_groups) * padded_cols(w.group_size) * batch;
    const size_t tables = w.bits == 1 ? x * kTablesPerByte : 0;
    return Arena::padded(x) + Arena::padded(size_t(w.n_groups) * batch * 4) + tables;
}

size_t Input::n_bytes(int64_t cols, int batch, size_t form_n_bytes, int n_forms) {
    return Arena::padded(cols * batch) + Arena::padded(batch * 4) + form_n_bytes * n_forms;
}

void Input::allocate(Arena& arena, int64_t cols, int batch, size_t form_n_bytes, int n_forms) {
    assert(n_forms <= kMaxForms);
    this->cols = cols;
    n_room = n_forms;
    q = static_cast<int8_t*>(arena.take(cols * batch));
    scales = static_cast<float*>(arena.take(batch * 4));
    for (int i = 0; i < n_forms; ++i) forms[i].x = static_cast<int8_t*>(arena.take(form_n_bytes));
}

void Input::quantize(const Path& path) {
    for (int b = 0; b < batch; ++b) scales[b] = path.quantize(rows + b * cols, cols, q + b * cols);
}

static const Input::Form* find_form(const Input& in, const Matrix& w) {
    for (int i = 0; i < in.n_forms; ++i)
        if (in.forms[i].group_size == w.group_size) return in.forms + i;
    return nullptr;
}

// Fewer rows, of all the matrices that share the tables, do not pay for their making: 8 bytes for each of x.
constexpr int kTableRows = 384;

void Input::arrange(const Path& path, const Matrix* const* w, int n) {
    assert(n <= n_room);
    n_forms = 0;
    for (int k = 0; k < n; ++k) {
        if (!w[k]->n_groups || find_form(*this, *w[k])) continue;
        Form& form = forms[n_forms++];
        const int64_t n_padded = padded_cols(w[k]->group_size);
        form.group_size = w[k]->group_size;
        const size_t x_n_bytes = Arena::padded(size_t(w[k]->n_groups) * n_padded * batch);
        form.sums = reinterpret_cast<int32_t*>(form.x + x_n_bytes);
        for (int g = 0; g < w[k]->n_groups; ++g)
            interleave(q + g * form.group_size, cols, w[k]->groups[g].cols, batch,
                       form.x + g * n_padded * batch, form.sums + g * batch);
        form.tables = nullptr;
        int64_t rows = 0;
        for (int other = k; other < n; ++other)
            if (w[other]->bits == 1 && w[other]->group_size == form.group_size) rows += w[other]->rows;
        if (!path.tabulate || rows < kTableRows) continue;
        const size_t sums_n_bytes = Arena::padded(size_t(w[k]->n_groups) * batch * 4);
        form.tables = reinterpret_cast<uint8_t*>(form.sums) + sums_n_bytes;
        for (int g = 0; g < w[k]->n_groups; ++g) {
            const int n_packs = padded_cols(w[k]->groups[g].cols) / kPadCols;    // of 1 bit
            path.tabulate(form.x + g * n_padded * batch, n_packs, batch,
                          form.tables + g * n_padded * batch * kTablesPerByte);
        }
    }
}

static void product_of_group(const Path& path, const Matrix& w, int g, const Input::Form& form,
                             int batch, int block, int n_blocks, int32_t* y) {
    const ColumnGroup& group = w.groups[g];
    const size_t at = size_t(g) * padded_cols(w.group_size) * batch;
    const int32_t* sums = form.sums + g * batch;
    if (group.bits == 1 && form.tables)
        path.product_of_tables(group, form.tables + at * kTablesPerByte, sums, batch, block, n_blocks, y);
    else
        path.product(group, form.x + at, sums, batch, block, n_blocks, y);
}

void multiply(const Path& path, const Matrix& w, const Input& x, int block, int n_blocks, void* y,
              float* partial, const float* sum, const float* bias, int n, float* out, int64_t stride) {
    const int n_padded = n_blocks * kBlockRows;
    if (!w.n_groups) {
        float* from = static_cast<float*>(y);
        path.float_product(w, x.rows, x.batch, block, n_blocks, from);
        for (int b = 0; b < x.batch; ++b)
            path.add(from + size_t(b) * n_padded, sum ? sum + size_t(b) * n_padded : nullptr, bias, n,
                     out + b * stride);
        return;
    }
    const Input::Form& form = *find_form(x, w);
    int32_t* from = static_cast<int32_t*>(y);
    for (int g = 0; g < w.n_groups; ++g) {
        const ColumnGroup& group = w.groups[g];
        const bool last = g == w.n_groups - 1;
        product_of_group(path, w, g, form, x.batch, block, n_blocks, from);
        for (int b = 0; b < x.batch; ++b) {
            const size_t at = size_t(b) * n_padded;
            path.dequantize(from + at, x.scales[b], group.scales + block * kBlockRows, sum ? sum + at : nullptr,
                            last ? bias : nullptr, last ? n : n_padded,
                            last ? out + b * stride : partial + at);
        }
        sum = partial;
    }
}

}  // namespace mpq

namespace {

// Scratch of a call that computes products of one matrix: the input, and y and partial of each thread.
struct Scratch {
    Input in;
    char* y;
    size_t thread_n_bytes;

    void* of(int slot) const { return y + slot * thread_n_bytes; }

    bool allocate(const Matrix& w, int64_t batch, int chunk, int n_threads) {
        const int most = int(std::min<int64_t>(batch, mpq::kMaxBatch));
        const size_t form = Input::form_n_bytes(w, most);
        thread_n_bytes = 2 * mpq::product_n_bytes(most, chunk);
        Arena& arena = mpq::thread_arena();
        if (!arena.reserve(Input::n_bytes(w.cols, most, form, 1) + n_threads * thread_n_bytes))
            return false;
        in.allocate(arena, w.cols, most, form, 1);
        y = static_cast<char*>(arena.take(n_threads * thread_n_bytes));
        return true;
    }
};

struct Rows {    // of a matrix
    int block, n_blocks;
    int64_t first;
    int n;    // without padding

    int n_padded() const { return n_blocks * kBlockRows; }
};

// The whole product of one matrix, in pieces of the batch and chunks of rows. take(path, in, first) fills
// the input with in.batch rows from row `first` on; job(path, in, first, rows, scratch of the thread)
// multiplies.
template <class Take, class Job>
int multiply_all(const Matrix* w, int64_t batch, int path, int n_threads, const Take& take,
                 const Job& job) {
    const Path* p = mpq::find_path(path);
    if (!p) return mpq::kNoPath;
    if (!w || batch < 0 || n_threads < 1) return mpq::kBadArgument;
    mpq::follow(n_threads);
    n_threads = mpq::threads_for(n_threads, double(w->rows) * w->cols * batch);
    const int chunk = mpq::chunk_blocks(w->n_blocks, n_threads, batch);
    Scratch scratch{};
    if (!scratch.allocate(*w, batch, chunk, n_threads)) return mpq::kNoMemory;
    Input& in = scratch.in;
    for (int64_t first = 0; first < batch; first += mpq::kMaxBatch) {
        in.batch = int(std::min<int64_t>(batch - first, mpq::kMaxBatch));
        take(*p, in, first);
        in.arrange(*p, &w, 1);
        mpq::parallel(n_threads, (w->n_blocks + chunk - 1) / chunk, [&](int i, int slot) {
            const int block = i * chunk, n_blocks = std::min(chunk, w->n_blocks - block);
            const int64_t row = int64_t(block) * kBlockRows;
            const int n = int(std::min<int64_t>(w->rows - row, n_blocks * kBlockRows));
            job(*p, in, first, Rows{block, n_blocks, row, n}, scratch.of(slot));
        });
    }
    return mpq::kOk;
}

}  // namespace

MPQ_API int mpq_quantize(const float* x, int64_t batch, int64_t cols, int8_t* q, float* scales,
                         int path) {
    const Path* p = mpq::find_path(path);
    if (!p) return mpq::kNoPath;
    for (int64_t b = 0; b < batch; ++b) scales[b] = p->quantize(x + b * cols, cols, q + b * cols);
    return mpq::kOk;
}

MPQ_API int mpq_product(const Matrix* w, const int8_t* x, int64_t batch, int32_t* y, int path,
                        int n_threads) {
    if (w && !w->n_groups) return mpq::kBadArgument;
    const auto take = [&](const Path&, Input& in, int64_t first) {
        std::memcpy(in.q, x + first * w->cols, size_t(in.batch) * w->cols);
    };
    const auto job = [&](const Path& p, const Input& in, int64_t first, const Rows& rows, void* scratch) {
        int32_t* from = static_cast<int32_t*>(scratch);
        for (int g = 0; g < w->n_groups; ++g) {
            mpq::product_of_group(p, *w, g, in.forms[0], in.batch, rows.block, rows.n_blocks, from);
            for (int b = 0; b < in.batch; ++b)
                std::memcpy(y + (g * batch + first + b) * w->rows + rows.first,
                            from + b * rows.n_padded(), size_t(rows.n) * 4);
        }
    };
    return multiply_all(w, batch, path, n_threads, take, job);
}

MPQ_API int mpq_linear(const Matrix* w, const float* x, int64_t batch, const float* bias, float* y,
                       int path, int n_threads) {
    const auto take = [&](const Path& p, Input& in, int64_t first) {
        in.rows = x + first * w->cols;
        if (w->n_groups) in.quantize(p);
    };
    const auto job = [&](const Path& p, const Input& in, int64_t first, const Rows& rows, void* scratch) {
        // The caller's bias is not padded, so a copy is.
        alignas(mpq::kAlignment) float padded[mpq::kMostChunkBlocks * kBlockRows];
        if (bias) {
            std::memset(padded + rows.n, 0, size_t(rows.n_padded() - rows.n) * 4);
            std::memcpy(padded, bias + rows.first, size_t(rows.n) * 4);
        }
        float* own = static_cast<float*>(scratch);
        multiply(p, *w, in, rows.block, rows.n_blocks, own, own + in.batch * rows.n_padded(), nullptr,
                 bias ? padded : nullptr, rows.n, y + first * w->rows + rows.first, w->rows);
    };
    return multiply_all(w, batch, path, n_threads, take, job);
}

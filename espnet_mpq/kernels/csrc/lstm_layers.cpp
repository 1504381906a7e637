// LSTM layers: products of the input and of the hidden state, gates and cells, block by block on all threads.
#include "lstm_layers.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "threads.h"

namespace mpq {

bool fits(const Matrix* w, int64_t rows, int64_t cols) {
    return w && w->rows == rows && w->cols == cols;
}

bool any_floats(const Matrix* const* w, int n) {
    return std::any_of(w, w + n, [](const Matrix* one) { return one->n_groups == 0; });
}

static bool any_codes(const Matrix* const* w, int n) {
    return std::any_of(w, w + n, [](const Matrix* one) { return one->n_groups > 0; });
}

double n_products(const Matrix* const* w, int n, int batch) {
    double sum = 0;
    for (int k = 0; k < n; ++k) sum += double(w[k]->rows) * w[k]->cols * batch;
    return sum;
}

float* padded_bias(const float* bias, int64_t n) {
    const size_t n_padded = padded_rows(n);
    float* made = static_cast<float*>(aligned_new(n_padded * 4));
    if (!made) return nullptr;
    std::memset(made, 0, n_padded * 4);
    std::memcpy(made, bias, n * 4);
    return made;
}

bool LstmLayers::fill(int n_layers, int64_t n_in, int64_t nhid, const Matrix* const* matrices,
                      const float* const* biases) {
    if (n_layers < 1 || n_layers > INT32_MAX / kMatrices) return false;
    this->n_in = n_in;
    this->nhid = nhid;
    const int n_matrices = kMatrices * n_layers;
    this->matrices = new (std::nothrow) const Matrix*[n_matrices];
    this->biases = new (std::nothrow) float*[kGates * n_layers]();
    if (!this->matrices || !this->biases) return false;
    this->n_layers = n_layers;
    for (int k = 0; k < n_matrices; ++k) {
        const bool is_first_input = k < kGates;
        if (!fits(matrices[k], nhid, is_first_input ? n_in : nhid)) return false;
        this->matrices[k] = matrices[k];
    }
    for (int k = 0; k < kGates * n_layers; ++k)
        if (!(this->biases[k] = padded_bias(biases[k], nhid))) return false;
    return true;
}

LstmLayers::~LstmLayers() {
    for (int k = 0; k < kGates * n_layers; ++k) aligned_delete(biases[k]);
    delete[] biases;
    delete[] matrices;
}

size_t LstmRun::chunk_n_bytes(int batch) {
    return product_n_bytes(std::max(batch, kMostChunkBlocks / kChunkBlocks), kChunkBlocks);
}

size_t LstmRun::form_n_bytes(int batch, const Matrix* last) const {
    size_t form = last ? Input::form_n_bytes(*last, batch) : 0;
    for (int k = 0; k < LstmLayers::kMatrices * layers.n_layers; ++k)
        form = std::max(form, Input::form_n_bytes(*layers.matrices[k], batch));
    return form;
}

size_t LstmRun::n_bytes(int batch, const Matrix* last) const {
    const size_t form = form_n_bytes(batch, last);
    const int64_t widest = std::max(layers.n_in, layers.nhid);
    return Input::n_bytes(widest, batch, form, kGates) + Input::n_bytes(layers.nhid, batch, form, kGates) +
           2 * rows_n_bytes(batch) + size_t(n_threads) * (1 + kGates) * chunk_n_bytes(batch);
}

void LstmRun::allocate(Arena& arena, int batch, const Matrix* last) {
    const size_t form = form_n_bytes(batch, last), rows = rows_n_bytes(batch);
    in.allocate(arena, std::max(layers.n_in, layers.nhid), batch, form, kGates);
    hidden.allocate(arena, layers.nhid, batch, form, kGates);
    for (float** to : {&copied, &zeros}) *to = static_cast<float*>(arena.take(rows));
    std::memset(zeros, 0, rows);
    scratch_n_bytes = (1 + kGates) * chunk_n_bytes(batch);    // y and the gates
    scratch = static_cast<char*>(arena.take(n_threads * scratch_n_bytes));
}

void LstmRun::arrange(Input& x, const Matrix* const* w, int n) const {
    if (any_codes(w, n)) x.quantize(path);
    x.arrange(path, w, n);
}

void LstmRun::layer(int l, const float* h_in, const float* c_in, float* h_out, float* c_out) {
    const Matrix *const *of_input = layers.of_input(l), *const *of_hidden = layers.of_hidden(l);
    const int64_t nhid = layers.nhid;
    in.batch = hidden.batch = batch;
    hidden.rows = h_in ? h_in : zeros;
    if (!c_in) c_in = zeros;
    if (any_floats(of_hidden, kGates)) {
        // Products read h while others write it: after the first token it is the same memory.
        std::memcpy(copied, hidden.rows, size_t(batch) * nhid * 4);
        hidden.rows = copied;
    }
    arrange(hidden, of_hidden, kGates);
    const int total = of_input[0]->n_blocks;
    const int used = threads_for(n_threads, n_products(of_input, LstmLayers::kMatrices, batch));
    const int chunk = chunk_blocks(total, used, batch);
    parallel(used, (total + chunk - 1) / chunk, [&](int i, int slot) {
        const int block = i * chunk, n_blocks = std::min(chunk, total - block);
        const int64_t row = int64_t(block) * kBlockRows;
        const int n_padded = n_blocks * kBlockRows, n = int(std::min<int64_t>(nhid - row, n_padded));
        const float* bias[kGates];
        for (int k = 0; k < kGates; ++k) {
            float* to = gate(slot, k);
            multiply(path, *of_input[k], in, block, n_blocks, y(slot), to, nullptr, nullptr, n_padded, to,
                     n_padded);
            multiply(path, *of_hidden[k], hidden, block, n_blocks, y(slot), to, to, nullptr, n_padded, to,
                     n_padded);
            bias[k] = layers.biases[kGates * l + k] + row;
        }
        for (int b = 0; b < batch; ++b) {
            const float* gates[kGates];
            for (int k = 0; k < kGates; ++k) gates[k] = gate(slot, k) + size_t(b) * n_padded;
            const int64_t at = b * nhid + row;
            path.cell(gates, bias, n, c_in + at, c_out + at, h_out + at);
        }
    });
    in.rows = h_out;
    in.cols = nhid;
}

}  // namespace mpq

// The LSTM LM for a batch of hypotheses: embedding, layers, output projection, log-softmax.
#include <cstring>
#include <initializer_list>
#include <new>

#include "api.h"
#include "kernels.h"

using mpq::Lstm;
using mpq::Matrix;
using mpq::Path;

namespace mpq {

struct Lstm {
    int n_layers;
    int64_t unit, nhid, vocab_size;
    const Matrix** matrices;    // 8 a layer, then the output
    float** biases;             // 4 a layer, then the output's; padded to 16
    const uint8_t* codes;
    int bits;
    int8_t levels[256];
    float* embedding_scales;    // (vocab_size,)
};

}  // namespace mpq

static bool fits(const Matrix* m, int64_t rows, int64_t cols) {
    return m && m->rows == rows && m->cols == cols;
}

static bool all_fit(const Lstm& lstm, const Matrix* const* matrices) {
    for (int l = 0; l < lstm.n_layers; ++l)
        for (int k = 0; k < 8; ++k)
            if (!fits(matrices[8 * l + k], lstm.nhid, l == 0 && k < 4 ? lstm.unit : lstm.nhid))
                return false;
    return fits(matrices[8 * lstm.n_layers], lstm.vocab_size, lstm.nhid);
}

MPQ_API void mpq_lstm_free(Lstm* lstm) {
    if (!lstm) return;
    if (lstm->biases)
        for (int i = 0; i < 4 * lstm->n_layers + 1; ++i) mpq::aligned_delete(lstm->biases[i]);
    delete[] lstm->biases;
    delete[] lstm->matrices;
    delete[] lstm->embedding_scales;
    delete lstm;
}

MPQ_API Lstm* mpq_lstm_new(int n_layers, int64_t unit, int64_t nhid, int64_t vocab_size,
                           const Matrix* const* matrices, const float* const* biases,
                           const uint8_t* codes, int bits, const int8_t* levels, int n_levels,
                           const float* scales, int64_t n_scales) {
    if (n_layers < 1 || (n_scales != 1 && n_scales != vocab_size)) return nullptr;
    if (unit < 1 || unit > mpq::kMaxCols || n_levels < 1 || n_levels > 256) return nullptr;
    if (bits != 1 && bits != 2 && bits != 4 && bits != 8) return nullptr;
    Lstm* lstm = new (std::nothrow) Lstm();
    if (!lstm) return nullptr;
    lstm->n_layers = n_layers;
    lstm->unit = unit;
    lstm->nhid = nhid;
    lstm->vocab_size = vocab_size;
    lstm->codes = codes;
    lstm->bits = bits;
    std::memcpy(lstm->levels, levels, size_t(n_levels));
    const int n_matrices = 8 * n_layers + 1, n_biases = 4 * n_layers + 1;
    lstm->matrices = new (std::nothrow) const Matrix*[n_matrices];
    lstm->biases = new (std::nothrow) float*[n_biases]();
    lstm->embedding_scales = new (std::nothrow) float[vocab_size];
    bool good = lstm->matrices && lstm->biases && lstm->embedding_scales && all_fit(*lstm, matrices);
    for (int i = 0; good && i < n_biases; ++i) {
        const size_t n = i == n_biases - 1 ? vocab_size : nhid, n_padded = (n + 15) / 16 * 16;
        lstm->biases[i] = static_cast<float*>(mpq::aligned_new(n_padded * 4));
        good = lstm->biases[i] != nullptr;
        if (!good) break;
        std::memset(lstm->biases[i], 0, n_padded * 4);
        std::memcpy(lstm->biases[i], biases[i], n * 4);
    }
    if (!good) {
        mpq_lstm_free(lstm);
        return nullptr;
    }
    std::memcpy(lstm->matrices, matrices, sizeof(Matrix*) * n_matrices);
    for (int64_t i = 0; i < vocab_size; ++i)
        lstm->embedding_scales[i] = scales[n_scales == 1 ? 0 : i];
    return lstm;
}

namespace {

// Quantized activations of one batch.
struct Input {
    int8_t* x;
    int32_t* sums;
    float* scales;
};

struct Run {
    const Lstm& lstm;
    const Path& path;
    int batch;                    // of this piece
    int64_t all, first;           // of the whole call; first row of this piece
    int8_t* q;
    Input in, hidden;
    int32_t* y[8];

    // The embedding is int8 already: levels are the activations, the row's scale is theirs.
    void embed(const int64_t* tokens, int64_t stride) {
        const int bits = lstm.bits, mask = (1 << bits) - 1;
        const int64_t row_n_bytes = (lstm.unit * bits + 7) / 8;
        for (int b = 0; b < batch; ++b) {
            const int64_t token = tokens[(first + b) * stride];
            const uint8_t* from = lstm.codes + token * row_n_bytes;
            int8_t* to = q + b * lstm.unit;
            for (int64_t k = 0; k < lstm.unit; ++k)
                to[k] = lstm.levels[(from[k * bits / 8] >> (k * bits % 8)) & mask];
            in.scales[b] = lstm.embedding_scales[token];
        }
        mpq::interleave(q, lstm.unit, lstm.unit, batch, in.x, in.sums);
    }

    // Rows first .. first + batch of layer `layer` of a state; null is zeros.
    void quantize(const float* state, int layer, Input to) {
        const int64_t n = lstm.nhid;
        for (int b = 0; b < batch; ++b) {
            to.scales[b] = 0.0f;
            if (state)
                to.scales[b] =
                    path.quantize(state + (layer * all + first + b) * n, n, q + b * n);
            else
                std::memset(q + b * n, 0, n);
        }
        mpq::interleave(q, n, n, batch, to.x, to.sums);
    }

    void layer(int l, const float* c_in, float* h_out, float* c_out) {
        const Matrix* const* m = lstm.matrices + 8 * l;
        for (int block = 0; block < m[0]->n_blocks; block += mpq::kChunkBlocks) {
            const int left = m[0]->n_blocks - block;
            const int n_blocks = left < mpq::kChunkBlocks ? left : mpq::kChunkBlocks;
            const int64_t row = int64_t(block) * 16, rest = lstm.nhid - row;
            const int n = int(rest < n_blocks * 16 ? rest : n_blocks * 16);
            const float *scales[8], *bias[4];
            for (int k = 0; k < 8; ++k) {
                const Input& x = k < 4 ? in : hidden;
                path.product(*m[k], x.x, x.sums, batch, block, n_blocks, y[k]);
                scales[k] = m[k]->scales + row;
            }
            for (int k = 0; k < 4; ++k) bias[k] = lstm.biases[4 * l + k] + row;
            alignas(64) float zeros[mpq::kChunkBlocks * 16] = {};
            for (int b = 0; b < batch; ++b) {
                const int32_t* products[8];
                for (int k = 0; k < 8; ++k) products[k] = y[k] + size_t(b) * n_blocks * 16;
                const int64_t at = (l * all + first + b) * lstm.nhid + row;
                path.cell(products, in.scales[b], hidden.scales[b], scales, bias, n,
                          c_in ? c_in + at : zeros, c_out + at, h_out + at);
            }
        }
    }

    // out: row b at out + b * stride
    void output(float* out, int64_t stride, bool log_probs) {
        const Matrix& m = *lstm.matrices[8 * lstm.n_layers];
        const float* bias = lstm.biases[4 * lstm.n_layers];
        for (int block = 0; block < m.n_blocks; block += mpq::kChunkBlocks) {
            const int left = m.n_blocks - block;
            const int n_blocks = left < mpq::kChunkBlocks ? left : mpq::kChunkBlocks;
            path.product(m, in.x, in.sums, batch, block, n_blocks, y[0]);
            const int64_t row = int64_t(block) * 16, rest = m.rows - row;
            const int n = int(rest < n_blocks * 16 ? rest : n_blocks * 16);
            for (int b = 0; b < batch; ++b)
                path.dequantize(y[0] + size_t(b) * n_blocks * 16, in.scales[b], m.scales + row,
                                bias + row, n, out + (first + b) * stride + row);
        }
        for (int b = 0; log_probs && b < batch; ++b)
            path.log_softmax(out + (first + b) * stride, m.rows);
    }
};

}  // namespace

MPQ_API int mpq_lstm_run(const Lstm* lstm, const int64_t* tokens, int64_t batch, int64_t length,
                         const float* h_in, const float* c_in, float* h_out, float* c_out, float* out,
                         int log_probs, int path) {
    const Path* p = mpq::find_path(path);
    if (!p) return -2;
    if (!lstm || batch < 0 || length < 1) return -1;
    for (int64_t i = 0; i < batch * length; ++i)
        if (tokens[i] < 0 || tokens[i] >= lstm->vocab_size) return -4;
    const size_t most = batch < mpq::kMaxBatch ? batch : mpq::kMaxBatch;
    const int64_t widest = lstm->unit > lstm->nhid ? lstm->unit : lstm->nhid;
    const size_t x_size = mpq::Arena::padded(most * mpq::padded_cols(widest));
    const size_t sum_size = mpq::Arena::padded(most * 4);
    const size_t y_size = most * mpq::kChunkBlocks * 16 * 4;
    mpq::Arena& arena = mpq::thread_arena();
    if (!arena.reserve(3 * x_size + 4 * sum_size + 8 * y_size)) return -3;
    Run run{*lstm, *p, 0, batch, 0, nullptr, {}, {}, {}};
    run.q = static_cast<int8_t*>(arena.take(x_size));
    for (Input* input : {&run.in, &run.hidden}) {
        input->x = static_cast<int8_t*>(arena.take(x_size));
        input->sums = static_cast<int32_t*>(arena.take(sum_size));
        input->scales = static_cast<float*>(arena.take(sum_size));
    }
    for (int k = 0; k < 8; ++k) run.y[k] = static_cast<int32_t*>(arena.take(y_size));
    for (int64_t first = 0; first < batch; first += mpq::kMaxBatch) {
        run.first = first;
        run.batch = int(batch - first < mpq::kMaxBatch ? batch - first : mpq::kMaxBatch);
        for (int64_t t = 0; t < length; ++t) {
            // After the first token the state is read where it was written.
            const float *h = t ? h_out : h_in, *c = t ? c_out : c_in;
            run.embed(tokens + t, length);
            for (int l = 0; l < lstm->n_layers; ++l) {
                run.quantize(h, l, run.hidden);
                run.layer(l, c, h_out, c_out);
                run.quantize(h_out, l, run.in);
            }
            run.output(out + t * lstm->vocab_size, length * lstm->vocab_size, log_probs != 0);
        }
    }
    return 0;
}

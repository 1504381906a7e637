// The LSTM LM for a batch of hypotheses: embedding, layers, output projection, log-softmax.
#include <algorithm>
#include <cstring>
#include <new>

#include "api.h"
#include "products.h"
#include "threads.h"

using mpq::Arena;
using mpq::Input;
using mpq::Lstm;
using mpq::Matrix;
using mpq::Path;
using mpq::Weights;

namespace mpq {

struct Lstm {
    int n_layers;
    int64_t unit, nhid, vocab_size;
    const Weights** weights;    // the embedding, 8 a layer, the output
    float** biases;             // 4 a layer, then the output's; padded to 16

    const Weights* const* of_layer(int l) const { return weights + 1 + 8 * l; }
    const Weights* const* output() const { return weights + 1 + 8 * n_layers; }
};

}  // namespace mpq

static bool fits(const Weights* w, int64_t rows, int64_t cols) {
    return w && w->rows == rows && w->cols == cols;
}

static bool all_fit(const Lstm& lstm, const Weights* const* weights) {
    for (int l = 0; l < lstm.n_layers; ++l)
        for (int k = 0; k < 8; ++k)
            if (!fits(weights[1 + 8 * l + k], lstm.nhid, l == 0 && k < 4 ? lstm.unit : lstm.nhid))
                return false;
    return fits(weights[0], lstm.vocab_size, lstm.unit) &&
           fits(weights[1 + 8 * lstm.n_layers], lstm.vocab_size, lstm.nhid);
}

MPQ_API void mpq_lstm_free(Lstm* lstm) {
    if (!lstm) return;
    if (lstm->biases)
        for (int i = 0; i < 4 * lstm->n_layers + 1; ++i) mpq::aligned_delete(lstm->biases[i]);
    delete[] lstm->biases;
    delete[] lstm->weights;
    delete lstm;
}

MPQ_API Lstm* mpq_lstm_new(int n_layers, int64_t unit, int64_t nhid, int64_t vocab_size,
                           const Weights* const* weights, const float* const* biases) {
    if (n_layers < 1) return nullptr;
    Lstm* lstm = new (std::nothrow) Lstm();
    if (!lstm) return nullptr;
    lstm->n_layers = n_layers;
    lstm->unit = unit;
    lstm->nhid = nhid;
    lstm->vocab_size = vocab_size;
    const int n_weights = 8 * n_layers + 2, n_biases = 4 * n_layers + 1;
    lstm->weights = new (std::nothrow) const Weights*[n_weights];
    lstm->biases = new (std::nothrow) float*[n_biases]();
    bool good = lstm->weights && lstm->biases && all_fit(*lstm, weights);
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
    std::memcpy(lstm->weights, weights, sizeof(Weights*) * n_weights);
    return lstm;
}

namespace {

bool any_floats(const Weights* const* w, int n) {
    return std::any_of(w, w + n, [](const Weights* one) { return one->n_groups == 0; });
}

bool any_codes(const Weights* const* w, int n) {
    return std::any_of(w, w + n, [](const Weights* one) { return one->n_groups > 0; });
}

double n_products(const Weights* const* w, int n, int batch) {
    double sum = 0;
    for (int k = 0; k < n; ++k) sum += double(w[k]->rows) * w[k]->cols * batch;
    return sum;
}

// What a step of one piece of the batch needs; y and the four gates are each thread's own.
struct Run {
    const Lstm& lstm;
    const Path& path;
    int n_threads;
    int batch;             // of this piece
    int64_t all, first;    // of the whole call; first row of this piece
    Input in, hidden;
    float *embedded, *copied, *zeros;    // (batch, unit), (batch, nhid), (batch, nhid)
    char* scratch;
    size_t scratch_n_bytes;              // of one thread

    bool allocate() {
        const int most = int(std::min<int64_t>(all, mpq::kMaxBatch));
        const int64_t widest = std::max(lstm.unit, lstm.nhid);
        size_t form = 0;
        for (int k = 0; k < 8 * lstm.n_layers + 1; ++k)
            form = std::max(form, Input::form_n_bytes(*lstm.of_layer(0)[k], most));
        const size_t rows = Arena::padded(size_t(most) * widest * 4);
        scratch_n_bytes = 5 * chunk_n_bytes(most);
        Arena& arena = mpq::thread_arena();
        if (!arena.reserve(2 * Input::n_bytes(widest, most, form, 4) + 3 * rows +
                           n_threads * scratch_n_bytes))
            return false;
        in.allocate(arena, widest, most, form, 4);
        hidden.allocate(arena, widest, most, form, 4);
        for (float** to : {&embedded, &copied, &zeros}) *to = static_cast<float*>(arena.take(rows));
        scratch = static_cast<char*>(arena.take(n_threads * scratch_n_bytes));
        std::memset(zeros, 0, rows);
        return true;
    }

    // Never falls as the batch grows.
    static size_t chunk_n_bytes(int batch) {
        return mpq::product_n_bytes(std::max(batch, mpq::kMostChunkBlocks / mpq::kChunkBlocks),
                                    mpq::kChunkBlocks);
    }
    void* y(int slot) const { return scratch + slot * scratch_n_bytes; }
    float* gate(int slot, int k) const {
        return static_cast<float*>(y(slot)) + (k + 1) * chunk_n_bytes(batch) / 4;
    }

    // Rows first .. first + batch of layer l of a state; null is zeros.
    const float* of_state(const float* state, int l) const {
        return state ? state + (l * all + first) * lstm.nhid : zeros;
    }

    void arrange(Input& x, const Weights* const* w, int n) {
        if (any_codes(w, n)) x.quantize(path);
        x.arrange(path, w, n);
    }

    // Codes with one scale a row are int8 activations already; other rows are quantized as any.
    void embed(const int64_t* tokens, int64_t stride) {
        const Weights& w = *lstm.weights[0];
        const Weights* const* next = lstm.of_layer(0);
        const bool are_levels = w.n_groups == 1;
        in.rows = embedded;
        in.cols = lstm.unit;
        if (!are_levels || any_floats(next, 4))
            for (int b = 0; b < batch; ++b)
                mpq::float_row(w, tokens[(first + b) * stride], embedded + b * lstm.unit);
        if (!are_levels) return arrange(in, next, 4);
        const Matrix& m = w.groups[0];
        int8_t levels[256];
        for (int code = 0; code < 1 << m.bits; ++code) levels[code] = int8_t(mpq::level_of(m, code));
        for (int b = 0; b < batch; ++b) {
            const int64_t token = tokens[(first + b) * stride];
            uint8_t* row = reinterpret_cast<uint8_t*>(in.q + b * lstm.unit);
            mpq::codes_of_row(m, token, row);
            for (int64_t k = 0; k < lstm.unit; ++k) row[k] = uint8_t(levels[row[k]]);
            in.scales[b] = m.scales[token];
        }
        in.arrange(path, next, 4);
    }

    void layer(int l, const float* h_in, const float* c_in, float* h_out, float* c_out) {
        const Weights* const* w = lstm.of_layer(l);
        const int64_t nhid = lstm.nhid;
        hidden.rows = of_state(h_in, l);
        hidden.cols = nhid;
        if (any_floats(w + 4, 4)) {
            // Products read h while others write it: after the first token it is the same memory.
            std::memcpy(copied, hidden.rows, size_t(batch) * nhid * 4);
            hidden.rows = copied;
        }
        arrange(hidden, w + 4, 4);
        c_in = of_state(c_in, l);
        h_out += (l * all + first) * nhid;
        c_out += (l * all + first) * nhid;
        const int total = w[0]->n_blocks, used = mpq::threads_for(n_threads, n_products(w, 8, batch));
        const int chunk = mpq::chunk_blocks(total, used, batch);
        mpq::parallel(used, (total + chunk - 1) / chunk, [&](int i, int slot) {
            const int block = i * chunk, n_blocks = std::min(chunk, total - block);
            const int64_t row = int64_t(block) * 16;
            const int n_padded = n_blocks * 16, n = int(std::min<int64_t>(nhid - row, n_padded));
            const float* bias[4];
            for (int k = 0; k < 4; ++k) {
                float* to = gate(slot, k);
                multiply(path, *w[k], in, block, n_blocks, y(slot), to, nullptr, nullptr, n_padded, to,
                         n_padded);
                multiply(path, *w[4 + k], hidden, block, n_blocks, y(slot), to, to, nullptr, n_padded,
                         to, n_padded);
                bias[k] = lstm.biases[4 * l + k] + row;
            }
            for (int b = 0; b < batch; ++b) {
                const float* gates[4];
                for (int k = 0; k < 4; ++k) gates[k] = gate(slot, k) + size_t(b) * n_padded;
                const int64_t at = b * nhid + row;
                path.cell(gates, bias, n, c_in + at, c_out + at, h_out + at);
            }
        });
        in.rows = h_out;
        in.cols = nhid;
        const bool is_last = l == lstm.n_layers - 1;
        arrange(in, is_last ? lstm.output() : lstm.of_layer(l + 1), is_last ? 1 : 4);
    }

    // out: row b at out + b * stride
    void output(float* out, int64_t stride, bool log_probs) {
        const Weights* const* w = lstm.output();
        const float* bias = lstm.biases[4 * lstm.n_layers];
        const int total = w[0]->n_blocks, used = mpq::threads_for(n_threads, n_products(w, 1, batch));
        const int chunk = mpq::chunk_blocks(total, used, batch);
        out += first * stride;
        mpq::parallel(used, (total + chunk - 1) / chunk, [&](int i, int slot) {
            const int block = i * chunk, n_blocks = std::min(chunk, total - block);
            const int64_t row = int64_t(block) * 16;
            const int n = int(std::min<int64_t>(lstm.vocab_size - row, n_blocks * 16));
            multiply(path, *w[0], in, block, n_blocks, y(slot), gate(slot, 0), nullptr, bias + row, n,
                     out + row, stride);
        });
        // An exponential and its share of the sum cost about as much as 50 products.
        const double n_exp = double(batch) * lstm.vocab_size;
        if (log_probs)
            mpq::parallel(mpq::threads_for(n_threads, 50 * n_exp), batch, [&](int b, int) {
                path.log_softmax(out + b * stride, lstm.vocab_size);
            });
    }
};

}  // namespace

MPQ_API int mpq_lstm_run(const Lstm* lstm, const int64_t* tokens, int64_t batch, int64_t length,
                         const float* h_in, const float* c_in, float* h_out, float* c_out, float* out,
                         int log_probs, int path, int n_threads) {
    const Path* p = mpq::find_path(path);
    if (!p) return -2;
    if (!lstm || batch < 0 || length < 1 || n_threads < 1) return -1;
    for (int64_t i = 0; i < batch * length; ++i)
        if (tokens[i] < 0 || tokens[i] >= lstm->vocab_size) return -4;
    mpq::follow(n_threads);
    Run run{*lstm, *p, n_threads, 0, batch, 0, {}, {}, nullptr, nullptr, nullptr, nullptr, 0};
    if (!run.allocate()) return -3;
    for (int64_t first = 0; first < batch; first += mpq::kMaxBatch) {
        run.first = first;
        run.batch = run.in.batch = run.hidden.batch =
            int(std::min<int64_t>(batch - first, mpq::kMaxBatch));
        for (int64_t t = 0; t < length; ++t) {
            // After the first token the state is read where it was written.
            const float *h = t ? h_out : h_in, *c = t ? c_out : c_in;
            run.embed(tokens + t, length);
            for (int l = 0; l < lstm->n_layers; ++l) run.layer(l, h, c, h_out, c_out);
            run.output(out + t * lstm->vocab_size, length * lstm->vocab_size, log_probs != 0);
        }
    }
    return 0;
}

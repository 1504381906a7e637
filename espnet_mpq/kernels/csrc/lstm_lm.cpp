// The LSTM LM for a batch of hypotheses: embedding, layers, output projection, log-softmax.
#include <algorithm>
#include <cstring>
#include <new>

#include "api.h"
#include "lstm_layers.h"
#include "threads.h"

using mpq::Arena;
using mpq::ColumnGroup;
using mpq::kBlockRows;
using mpq::kGates;
using mpq::LstmLayers;
using mpq::LstmLm;
using mpq::LstmRun;
using mpq::Matrix;

namespace mpq {

struct LstmLm {
    int64_t vocab_size;
    const Matrix *embedding, *output;
    float* output_bias;    // padded to whole blocks
    LstmLayers layers;

    ~LstmLm() { aligned_delete(output_bias); }
};

}  // namespace mpq

MPQ_API void mpq_lstm_lm_free(LstmLm* lm) { delete lm; }

MPQ_API LstmLm* mpq_lstm_lm_new(int n_layers, int64_t unit, int64_t nhid, int64_t vocab_size,
                                const Matrix* const* matrices, const float* const* biases) {
    LstmLm* lm = new (std::nothrow) LstmLm();
    if (!lm) return nullptr;
    if (lm->layers.fill(n_layers, unit, nhid, matrices + 1, biases)) {
        lm->vocab_size = vocab_size;
        lm->embedding = matrices[0];
        lm->output = matrices[1 + LstmLayers::kMatrices * n_layers];
        if (mpq::fits(lm->embedding, vocab_size, unit) && mpq::fits(lm->output, vocab_size, nhid))
            lm->output_bias = mpq::padded_bias(biases[kGates * n_layers], vocab_size);
    }
    if (lm->output_bias) return lm;
    delete lm;
    return nullptr;
}

namespace {

// One piece of the batch, its embeddings and its logits.
struct LmRun {
    const LstmLm& lm;
    LstmRun run;
    int64_t all, first = 0;       // rows of the whole call; first row of this piece
    float* embedded = nullptr;    // (batch, unit)

    bool allocate() {
        const int most = int(std::min<int64_t>(all, mpq::kMaxBatch));
        const size_t rows = Arena::padded(size_t(most) * lm.layers.n_in * 4);
        Arena& arena = mpq::thread_arena();
        if (!arena.reserve(run.n_bytes(most, lm.output) + rows)) return false;
        run.allocate(arena, most, lm.output);
        embedded = static_cast<float*>(arena.take(rows));
        return true;
    }

    // The rows of this piece of layer l of a state (n_layers, all, nhid); null stays null.
    template <class Float>
    Float* of_state(Float* state, int l) const {
        return state ? state + (l * all + first) * lm.layers.nhid : nullptr;
    }

    // Codes with one scale a row are int8 activations already; other rows are quantized as any.
    void embed(const int64_t* tokens, int64_t stride) {
        const Matrix& w = *lm.embedding;
        const Matrix* const* next = lm.layers.of_input(0);
        const int64_t unit = lm.layers.n_in;
        const bool are_levels = w.n_groups == 1;
        run.in.batch = run.batch;
        run.in.rows = embedded;
        run.in.cols = unit;
        if (!are_levels || mpq::any_floats(next, kGates))
            for (int b = 0; b < run.batch; ++b)
                mpq::float_row(w, tokens[(first + b) * stride], embedded + b * unit);
        if (!are_levels) return run.arrange(run.in, next, kGates);
        const ColumnGroup& group = w.groups[0];
        int8_t levels[256];
        for (int code = 0; code < 1 << group.bits; ++code)
            levels[code] = int8_t(mpq::level_of(group, code));
        for (int b = 0; b < run.batch; ++b) {
            const int64_t token = tokens[(first + b) * stride];
            uint8_t* row = reinterpret_cast<uint8_t*>(run.in.q + b * unit);
            mpq::codes_of_row(group, token, row);
            for (int64_t k = 0; k < unit; ++k) row[k] = uint8_t(levels[row[k]]);
            run.in.scales[b] = group.scales[token];
        }
        run.in.arrange(run.path, next, kGates);
    }

    void step(const int64_t* tokens, int64_t stride, const float* h_in, const float* c_in, float* h_out,
              float* c_out) {
        embed(tokens, stride);
        for (int l = 0; l < lm.layers.n_layers; ++l) {
            if (l) run.arrange(run.in, lm.layers.of_input(l), kGates);
            run.layer(l, of_state(h_in, l), of_state(c_in, l), of_state(h_out, l), of_state(c_out, l));
        }
        run.arrange(run.in, &lm.output, 1);
    }

    // out: row b at out + b * stride
    void output(float* out, int64_t stride, bool log_probs) {
        const Matrix& w = *lm.output;
        const int used = mpq::threads_for(run.n_threads, mpq::n_products(&lm.output, 1, run.batch));
        const int total = w.n_blocks, chunk = mpq::chunk_blocks(total, used, run.batch);
        out += first * stride;
        mpq::parallel(used, (total + chunk - 1) / chunk, [&](int i, int slot) {
            const int block = i * chunk, n_blocks = std::min(chunk, total - block);
            const int64_t row = int64_t(block) * kBlockRows;
            const int n = int(std::min<int64_t>(lm.vocab_size - row, n_blocks * kBlockRows));
            multiply(run.path, w, run.in, block, n_blocks, run.y(slot), run.gate(slot, 0), nullptr,
                     lm.output_bias + row, n, out + row, stride);
        });
        // An exponential and its share of the sum cost about as much as 50 products.
        const double n_exp = double(run.batch) * lm.vocab_size;
        if (log_probs)
            mpq::parallel(mpq::threads_for(run.n_threads, 50 * n_exp), run.batch, [&](int b, int) {
                run.path.log_softmax(out + b * stride, lm.vocab_size);
            });
    }
};

}  // namespace

MPQ_API int mpq_lstm_lm_run(const LstmLm* lm, const int64_t* tokens, int64_t batch, int64_t length,
                            const float* h_in, const float* c_in, float* h_out, float* c_out, float* out,
                            int log_probs, int path, int n_threads) {
    const mpq::Path* p = mpq::find_path(path);
    if (!p) return mpq::kNoPath;
    if (!lm || batch < 0 || length < 1 || n_threads < 1) return mpq::kBadArgument;
    for (int64_t i = 0; i < batch * length; ++i)
        if (tokens[i] < 0 || tokens[i] >= lm->vocab_size) return mpq::kNoSuchRow;
    mpq::follow(n_threads);
    LmRun run{*lm, LstmRun{lm->layers, *p, n_threads}, batch};
    if (!run.allocate()) return mpq::kNoMemory;
    for (int64_t first = 0; first < batch; first += mpq::kMaxBatch) {
        run.first = first;
        run.run.batch = int(std::min<int64_t>(batch - first, mpq::kMaxBatch));
        for (int64_t t = 0; t < length; ++t) {
            // After the first token the state is read where it was written.
            run.step(tokens + t, length, t ? h_out : h_in, t ? c_out : c_in, h_out, c_out);
            run.output(out + t * lm->vocab_size, length * lm->vocab_size, log_probs != 0);
        }
    }
    return mpq::kOk;
}

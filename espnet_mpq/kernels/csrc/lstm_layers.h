// LSTM layers over one piece of a batch: what a language model is built around, and what an encoder (float
// rows in, a layer of each direction, lengths) or a prediction network (no output matrix) would be.
//
// Not for the units of one instruction set: what stands inline here must be portable code.
#pragma once
#include "products.h"

namespace mpq {

constexpr int kGates = 4;    // i, f, g, o
static_assert(kGates <= Input::kMaxForms);

// The weights of a stack of layers of one width. Per layer the matrices that the input meets, gates i, f, g, o,
// then those of the hidden state; they belong to somebody else. Biases are copies, padded to whole blocks.
struct LstmLayers {
    static constexpr int kMatrices = 2 * kGates;    // a layer
    int n_layers = 0;
    int64_t n_in = 0, nhid = 0;    // columns of the first layer's input; of the hidden state
    const Matrix** matrices = nullptr;
    float** biases = nullptr;

    // False for matrices of other shapes, and without memory.
    bool fill(int n_layers, int64_t n_in, int64_t nhid, const Matrix* const* matrices,
              const float* const* biases);
    ~LstmLayers();

    const Matrix* const* of_input(int l) const { return matrices + kMatrices * l; }
    const Matrix* const* of_hidden(int l) const { return of_input(l) + kGates; }
};

// A copy of `bias` (n,) with zeros to the end of its block; null without memory. Free with aligned_delete.
float* padded_bias(const float* bias, int64_t n);

// A piece of at most kMaxBatch rows on its way through the layers. `in` is what the next layer reads: its caller
// fills it for the first one and arranges it for the matrices that it meets.
struct LstmRun {
    const LstmLayers& layers;
    const Path& path;
    int n_threads;
    int batch;             // rows of this piece; it may fall from step to step
    Input in, hidden;
    float *copied, *zeros;    // (batch, nhid)
    char* scratch;
    size_t scratch_n_bytes;    // of one thread

    // Memory for pieces of up to `batch` rows; `last` is a matrix that the last layer's output meets, or null.
    size_t n_bytes(int batch, const Matrix* last) const;
    void allocate(Arena& arena, int batch, const Matrix* last);

    // Quantizes x and brings it into the forms of n matrices, unless all are of floats.
    void arrange(Input& x, const Matrix* const* w, int n) const;

    // Layer l: h and c (batch, nhid) in, null for zeros, and out, perhaps the same memory. Then `in` has the
    // rows of h_out, not arranged.
    void layer(int l, const float* h_in, const float* c_in, float* h_out, float* c_out);

    // Scratch of a thread: y for the integers of `multiply`, and sums of gate k for a chunk of blocks.
    void* y(int slot) const { return scratch + slot * scratch_n_bytes; }
    float* gate(int slot, int k) const {
        return reinterpret_cast<float*>(scratch + slot * scratch_n_bytes + (k + 1) * chunk_n_bytes(batch));
    }
    // Never falls as the batch grows.
    static size_t chunk_n_bytes(int batch);

private:
    size_t form_n_bytes(int batch, const Matrix* last) const;
    size_t rows_n_bytes(int batch) const { return Arena::padded(size_t(batch) * layers.nhid * 4); }
};

// Multiply-adds of n matrices.
double n_products(const Matrix* const* w, int n, int batch);

bool fits(const Matrix* w, int64_t rows, int64_t cols);
bool any_floats(const Matrix* const* w, int n);

}  // namespace mpq

// SPDX-License-Identifier: Apache-2.0
// The correction of neuron scores (METHODS L2 in the affine form of KERNELS 6):
//   sums[s, i] += sum over tokens v of p_sv (exp(x) - 1 - x),   x = scale_si a_iv - centre_si,
// where a_iv = w_i . E_v is the logit direction of neuron i, w_i its vector times the final norm's
// gain, and p_s a sample's distribution without the neuron. Where logits are soft-capped x is the
// capped logit's change less the centre and the term is p (exp(x) - 1).
//
// Two kernels form it: one from a panel of products a_iv that a matrix product made, one that
// multiplies itself and keeps the products in registers.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "core/dtype.h"

namespace pkt {

struct NeuronScoreParams {
  double* sums;          // [samples, rows], contiguous; added to
  const float* tokens;   // [samples, planes, columns]: TokenPlane, the last two where capped
  const float* neurons;  // [samples, 2, rows], contiguous: scale, centre; a scale 0 adds nothing
  float cap;             // 0: logits are not soft-capped
  int64_t samples, rows, columns;  // columns: tokens of the vocabulary
  int64_t token_sample_stride, token_plane_stride;

  PKT_HOST_DEVICE const float* plane(int64_t sample, int which) const {
    return tokens + sample * token_sample_stride + which * token_plane_stride;
  }
  PKT_HOST_DEVICE float scale(int64_t sample, int64_t row) const {
    return neurons[2 * sample * rows + row];
  }
  PKT_HOST_DEVICE float centre(int64_t sample, int64_t row) const {
    return neurons[(2 * sample + 1) * rows + row];
  }
};

// Products come in as a panel.
struct NeuronPanelParams {
  NeuronScoreParams score;
  const float* panel;  // [rows, columns], rows `panel_stride` apart
  int64_t panel_stride;
};

// How the product is cut: tiles of neurons by tiles of tokens, the tokens' tiles into runs that one
// block each goes through. Shapes alone decide, so that the order of additions does not depend on
// the device: about 1000 blocks fill any of them.
struct NeuronProductGrid {
  static constexpr int64_t kRows = 128;  // neurons of a tile

  int64_t columns;  // tokens of a tile
  int64_t parts;    // partial sums that a run keeps of a neuron
  int64_t row_tiles, column_tiles, run, runs;

  NeuronProductGrid(const NeuronScoreParams& p, int64_t tile_columns, int64_t partial_sums)
      : columns(tile_columns),
        parts(partial_sums),
        row_tiles((p.rows + kRows - 1) / kRows),
        column_tiles((p.columns + columns - 1) / columns) {
    const int64_t wanted = (1024 + row_tiles - 1) / row_tiles;
    run = (column_tiles + wanted - 1) / wanted;
    runs = (column_tiles + run - 1) / run;
  }

  PKT_HOST_DEVICE int64_t slot_rows() const { return row_tiles * kRows; }
  int64_t workspace(const NeuronScoreParams& p) const {
    return runs * parts * p.samples * slot_rows();
  }
};

// Products of 16-bit operands are formed on the tensor cores. The neurons' side is the sum of two
// such values, exact to 2^-17 (bfloat16) or 2^-22 (float16) of a neuron's largest weight.
struct NeuronProductParams {
  NeuronScoreParams score;
  const void* weights;  // [2, rows, depth], contiguous: high and low parts; depth a multiple of 32
  const void* head;     // [columns, head_depth], rows contiguous and at multiples of 16 bytes
  DType dtype;          // of weights and head: f16 or bf16
  int64_t depth, head_depth, head_stride;
  float* workspace;  // neuron_product_grid().workspace() values
};

// Which kernel: mma.sync on sm_80 and later, or wgmma on sm_90a, which nothing chooses by itself
// until a card has verified it.
enum class NeuronProduct { kMma, kWgmma };

inline NeuronProductGrid neuron_product_grid(const NeuronScoreParams& p, NeuronProduct which) {
  return which == NeuronProduct::kMma ? NeuronProductGrid(p, 128, 4) : NeuronProductGrid(p, 192, 1);
}

void neuron_panel_cpu(const NeuronPanelParams& params, int threads);
void neuron_panel_cuda(const NeuronPanelParams& params, void* stream);

bool neuron_product_runs(NeuronProduct which);  // on the current device
void neuron_product_cuda(const NeuronProductParams& params, NeuronProduct which, void* stream);

}  // namespace pkt

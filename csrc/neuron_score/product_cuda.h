// SPDX-License-Identifier: Apache-2.0
// The kernels that multiply neurons and head, each leaving a run's sums in the workspace,
// [run, part, sample, row].
#pragma once

#include "neuron_score/neuron_score.h"

namespace pkt {

void neuron_product_mma(const NeuronProductParams& params, const NeuronProductGrid& grid,
                        void* stream);
void neuron_product_wgmma(const NeuronProductParams& params, const NeuronProductGrid& grid,
                          void* stream);

}  // namespace pkt

"""mpq_nas_seq_rnn and mpq_nas_transformer: super-networks over the bits of every cluster."""

from __future__ import annotations

from typing import Callable, Dict, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F

from espnet_mpq.clusters import ClusterWeights
from espnet_mpq.errors import InputError
from espnet_mpq.hosts.espnet.lm.rnn import MpqSequentialRNNLM
from espnet_mpq.hosts.espnet.lm.transformer import MpqTransformerLM
from espnet_mpq.packed.size import most_fixed_n_bytes
from espnet_mpq.plan import budget_n_bytes, total_n_weights
from espnet_mpq.search.candidates import Candidates
from espnet_mpq.search.nas import Draw, Mixture
from espnet_mpq.search.nas_options import NasOptions

try:
    from torch.func import functional_call
except ImportError:  # torch 1.13
    from torch.nn.utils.stateless import functional_call

Weights = Dict[str, torch.Tensor]  # parameter name -> values used for it


class NasLm:
    """Mixin in front of a trainable mpq_* LM: weights come from a mixture of bit-widths.

    The parameters keep the names of the host's class; ``nas.logits`` is added. In train mode
    every forward pass draws the mixture (search/nas.py says how). In eval mode the LM is its
    one-best path with optimal scales, bit for bit the LM that `mpq plan` and post-training
    quantization would make of these weights; so valid.loss is that of a quantized LM. Before
    the logits were trained that path is the largest uniform bit-width within the budget (phase
    "weights" without one: the middle candidate).

    Args:
        vocab_size: as in the host.
        nas: the JSON form of NasOptions (``lm_conf.nas``).
        **host_options: as the host's class.

    Raises:
        InputError: bad options, a plan besides them, or a budget below the smallest LM.
    """

    def __init__(self, vocab_size: int, nas: Mapping, **host_options):
        if host_options.get("plan") is not None:
            raise InputError("an LM that searches its bits has no plan", todo="remove lm_conf.plan")
        super().__init__(vocab_size=vocab_size, **host_options)
        options = NasOptions.from_dict(nas)
        clusters = self.architecture.clusters()
        specs = list(options.specs().values())
        fixed = most_fixed_n_bytes(self.architecture, specs, options.scale_dtype)
        n_weights = total_n_weights(clusters, self.architecture.rest())
        budget = budget_n_bytes(n_weights, options.budget, options.budget_bytes)
        self.candidates = Candidates(ClusterWeights(self, clusters), options)
        names = [name for name, _ in self.named_parameters()]
        self.nas = Mixture(clusters, options, fixed, budget)
        self.nas.logits.requires_grad_(options.phase != "weights")
        if options.phase == "architecture":
            for name in names:
                self.get_parameter(name).requires_grad_(False)

    @property
    def trains_weights(self) -> bool:
        return self.nas.options.phase != "architecture"

    def _exact(self) -> bool:
        return not (self.training and self.trains_weights)

    def _cluster(self, draw: Draw, name: str) -> List[torch.Tensor]:
        """The weights of one cluster, mixed where the draw is no single bit-width."""
        chosen = draw[name]
        if isinstance(chosen, int):
            return self.candidates.single(name, chosen, self._exact())
        return self.candidates.mixed(name, chosen, self._exact())


class MpqNasSequentialRNNLM(NasLm, MpqSequentialRNNLM):
    """Super-network of the host's recurrent LM.

    Every quantized matrix enters linearly (the gates' pre-activations, embedding and output), so
    the sum of the candidates' outputs is the output of their summed weights: one run of the
    recurrence whatever the number of candidates. A gate's own non-linearity comes after the
    sum, as in Xu et al. 2021, where the pre-activation is the layer's output.
    """

    def forward(self, input: torch.Tensor, hidden) -> Tuple[torch.Tensor, object]:
        """tokens (B, T) and state or None -> logits (B, T, V) and state, as the host's."""
        weights = self._weights(self.nas.draw())
        embedding = weights["encoder.weight"]
        x = self.drop(F.embedding(input, embedding, self.encoder.padding_idx))
        output, hidden = self._run(x, hidden, weights)
        output = self.drop(output)
        flat = output.reshape(-1, output.shape[2])
        logits = F.linear(flat, weights.get("decoder.weight", embedding), self.decoder.bias)
        return logits.view(*output.shape[:2], -1), hidden

    def _weights(self, draw: Draw) -> Weights:
        """Every clustered parameter, put together from the rows of its clusters."""
        parts: Dict[str, list] = {}
        for name, cluster in self.candidates.clusters.items():
            for part, mat in zip(cluster.parts, self._cluster(draw, name)):
                parts.setdefault(part.parameter, []).append((part.start, mat))
        joined = {}
        for parameter, rows in parts.items():
            mats = [mat for _, mat in sorted(rows, key=lambda row: row[0])]
            joined[parameter] = mats[0] if len(mats) == 1 else torch.cat(mats)
        return joined

    def _run(self, x: torch.Tensor, hidden, weights: Weights):
        """nn.LSTM, nn.GRU or nn.RNN with other weights: x (B, T, D) -> (B, T, H)."""
        rnn = self.rnn
        flat = []
        for layer in range(rnn.num_layers):
            flat += [weights[f"rnn.weight_{k}_l{layer}"] for k in ("ih", "hh")]
            flat += [getattr(rnn, f"bias_{k}_l{layer}") for k in ("ih", "hh")]
        if hidden is None:
            zeros = x.new_zeros(rnn.num_layers, x.shape[0], rnn.hidden_size)
            hidden = (zeros, zeros) if rnn.mode == "LSTM" else zeros
        # Called below the module: torch 1.13 ignores other weights given to nn.LSTM.
        function = getattr(torch._VF, rnn.mode.lower())
        result = function(
            x, hidden, flat, True, rnn.num_layers, rnn.dropout, self.training, False, True
        )
        state = result[1:] if rnn.mode == "LSTM" else result[1]
        return result[0], state


class MpqNasTransformerLM(NasLm, MpqTransformerLM):
    """Super-network of the host's Transformer LM.

    The outputs of a sublayer (attention, feed-forward, embedding with the layer behind it)
    with each candidate's weights are summed, as in Xu et al. 2021; a one-hot draw runs that
    path alone. The output projection is linear, there the weights are summed.
    """

    def forward(self, input: torch.Tensor, hidden: None) -> Tuple[torch.Tensor, None]:
        """tokens (B, T) -> logits (B, T, V), None; as the host's."""
        draw = self.nas.draw()
        mask = self._target_mask(input)
        embed, (linear, *rest) = self.embed, self.encoder.embed

        def embedded(weights: Weights) -> torch.Tensor:
            x = F.embedding(input, weights["embed.weight"], embed.padding_idx)
            return F.linear(x, weights["encoder.embed.0.weight"], linear.bias)

        x = self._mix(draw, "embedding", embedded)
        for module in rest:
            x = module(x)
        for k, block in enumerate(self.encoder.encoders):
            h = block.norm1(x)
            attention = self._sublayer(draw, f"blocks.{k}.attention", block.self_attn)
            x = x + block.dropout(attention(h, h, h, mask))
            feed_forward = self._sublayer(draw, f"blocks.{k}.feed_forward", block.feed_forward)
            x = x + block.dropout(feed_forward(block.norm2(x)))
        (output,) = self._cluster(draw, "output")
        return F.linear(self.encoder.after_norm(x), output, self.decoder.bias), None

    def score(self, y: torch.Tensor, state, x: torch.Tensor) -> Tuple[torch.Tensor, None]:
        """Next-token log-probabilities; the whole prefix is run, for checks rather than speed."""
        return self(y[None], None)[0][0, -1].log_softmax(dim=-1), None

    def batch_score(
        self, ys: torch.Tensor, states: List, xs: torch.Tensor
    ) -> Tuple[torch.Tensor, List]:
        """As `score`, for hypotheses (B, length)."""
        return self(ys, None)[0][:, -1].log_softmax(dim=-1), [None] * len(ys)

    def _mix(self, draw: Draw, name: str, run: Callable[[Weights], torch.Tensor]) -> torch.Tensor:
        """sum_n p_n run(f_n(W)), or the one run of a one-hot draw."""
        chosen, exact = draw[name], self._exact()
        names = [part.parameter for part in self.candidates.clusters[name].parts]

        def output(bits: int) -> torch.Tensor:
            return run(dict(zip(names, self.candidates.single(name, bits, exact))))

        if isinstance(chosen, int):
            return output(chosen)
        terms = [p * output(bits) for p, bits in zip(chosen, self.candidates.bits)]
        return torch.stack(terms).sum(dim=0)

    def _sublayer(self, draw: Draw, name: str, module: torch.nn.Module) -> Callable:
        """``module`` as a function whose output is mixed."""

        def mixed(*inputs: Optional[torch.Tensor]) -> torch.Tensor:
            def run(weights: Weights) -> torch.Tensor:
                # encoder.encoders.0.self_attn.linear_q.weight -> linear_q.weight
                local = {n.split(".", 4)[4]: w for n, w in weights.items()}
                return functional_call(module, local, inputs)

            return self._mix(draw, name, run)

        return mixed

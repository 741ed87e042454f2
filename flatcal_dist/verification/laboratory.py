"""A bench for one step: a network in which all that a step could get wrong is at stake.

The network is the configuration's. Behind its logits come a batch norm, a dropout, and confidence,
so that statistics, random streams and CSAM's branch for confident samples matter for any network.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatcal_dist.config import Config, OptimizerConfig
from flatcal_dist.objectives import Targets
from flatcal_dist.sharpness import SAM, Rule, StepResult
from flatcal_dist.sharpness.rules import Loss
from flatcal_dist.sharpness.step import MicroBatches
from flatcal_dist.sharpness.weights import selection
from flatcal_dist.training.build import DTYPES, build_step

MICRO_BATCHES = (7, 5)  # images: two, uneven, and enough for batch statistics
IN_PAIRS = (8, 4)  # as many, for an objective that compares pairs of images
STREAM = 1000  # seed of rank r's random stream: STREAM + r
RATE, MOMENTUM = 0.05, 0.9
PROGRESS = 0.25  # the share of training that is over, for rules that depend on it
Weights = dict[str, Tensor]
LEADING = 4  # classes that the probe is sure of


class Probed(nn.Module):
    """The network, and behind its logits a batch norm, a dropout, and confidence in some classes.

    The first few classes lead by so much that about half of the images have a class above p = 1/2,
    where CSAM is not SAM. An untrained network has none.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.norm = nn.BatchNorm1d(classes)
        self.dropout = nn.Dropout(0.2)
        self.lead = 2 + math.log(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.dropout(self.norm(self.network(images).float()))
        return torch.cat([4 * logits[:, :LEADING] + self.lead, logits[:, LEADING:]], 1)


class Laboratory:
    """A step as the configuration says, which is put back to its start before each measurement.

    `sure` is the number of samples above p = 1/2 on all ranks. It is complete on rank 0.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        optimizer = OptimizerConfig(name="sgd", learning_rate=RATE, momentum=MOMENTUM)
        config = config.model_copy(update={"optimizer": optimizer})
        plain: list[nn.Module] = []

        def probe(network: nn.Module) -> nn.Module:
            probed = Probed(network, config.model.num_classes)
            plain.append(copy.deepcopy(probed))
            return probed

        self.step = build_step(config, accelerator, wrap=probe)
        [self.plain_network] = plain
        self.engine = self.step.engine
        self.start = copy.deepcopy(self.engine.local_state())
        self.low = config.train.precision != "fp32"
        self.sizes = MICRO_BATCHES if self.step.loss.pairs == "none" else IN_PAIRS
        self.samples = sum(self.sizes) * self.world_size
        self.step.loss.begin(self.samples, self.engine.device)
        self.sure = 0
        # The reference, on rank 0, needs the batches of all ranks.
        wanted = range(self.world_size) if self.rank == 0 else [self.rank]
        self.batches = {rank: self._labelled(rank) for rank in wanted}
        self.sam = SAM(max(config.sharpness.rho, 1e-3))
        self.trained = [n for n, w in self.plain_network.named_parameters() if w.requires_grad]
        self.buffers = [n for n, _ in self.plain_network.named_buffers()]
        self.unset = [  # registered as None: a pass may have filled them
            (name, key)
            for name, module in self.plain_network.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is None
        ]
        self._find_loss_scale()

    def _find_loss_scale(self) -> None:
        """Start from a loss scale at which the step is taken and not skipped, in fp16."""
        while self.engine.scales_losses:
            torch.manual_seed(STREAM + self.rank)
            self.start = copy.deepcopy(self.engine.local_state())
            result = self.step(self.batches[self.rank], samples=self.samples)
            if not result.skipped or result.loss_scale == 1:
                break

    def _labelled(self, rank: int) -> MicroBatches:
        """Return the micro-batches of one rank, labelled in its random stream.

        Where the network is sure of a class, the label is this class; elsewhere it is another. So
        no sample is near CSAM's jump at p = 1/2, where rounding would decide.
        """
        data = self.config.data
        generator = torch.Generator().manual_seed(rank)
        shape = (data.channels, data.image_size, data.image_size)
        scratch = copy.deepcopy(self.plain_network).to(self.engine.device).train()
        torch.manual_seed(STREAM + rank)
        micro_batches = []
        numbers = torch.arange(self.samples, device=self.engine.device).chunk(self.world_size)
        for size, samples in zip(self.sizes, numbers[rank].split(self.sizes), strict=True):
            images = torch.randn(size, *shape, generator=generator).to(self.engine.device)
            with torch.no_grad(), precision_of(self):
                p = scratch(images).float().softmax(1)
            sure = p.amax(1) > 0.65
            self.sure += int(sure.sum())
            likely = p.topk(min(3, p.shape[1])).indices  # the third is at most 1/3
            labels = torch.where(sure, likely[:, 0], likely[:, -1])
            micro_batches.append((images, Targets(labels, samples)))
        return micro_batches

    def weights(self) -> Weights:
        """Return full weights and buffers on the CPU. They are whole on rank 0."""
        return {name: tensor.clone() for name, tensor in self.engine.full_weights().items()}

    def take(
        self,
        rule: Rule | None = None,
        *,
        rate: float = RATE,
        plain: bool = False,
        micro_batches: MicroBatches | None = None,
        descent_loss: Loss | None = None,
        measure: bool = False,
        steps: int = 1,
    ) -> tuple[StepResult, Weights, Weights]:
        """Take steps from the start, by default as configured.

        Args:
            rule: The rule in place of the configured one. Its rho is the length of e.
            rate: The learning rate.
            plain: Whether to take steps without a rule.
            micro_batches: The micro-batches, or None for those of this rank.
            descent_loss: The loss at w + e, in place of the rule's.
            measure: Whether to measure e.
            steps: The number of steps.

        Returns:
            The last result, the weights before, and the weights after.
        """
        for name, key in self.unset:
            setattr(self.engine.named.get_submodule(name), key, None)
        self.engine.load_local_state(copy.deepcopy(self.start))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = self.weights()
        step = self.step
        own = step.rule, step.descent_loss, step.selects
        if rule is not None or plain:
            step.rule = rule
        if step.rule is not None:
            step.selects = selection(step.rule, self.engine.named)
            step.descent_loss = descent_loss or step.rule.descent_loss(step.loss)
        step.memory = None
        micro_batches = micro_batches or self.batches[self.rank]
        try:
            for at in range(steps):
                torch.manual_seed(STREAM + self.rank)
                result = step(
                    micro_batches,
                    at=at,
                    samples=self.samples,
                    progress=PROGRESS,
                    measure=measure,
                )
        finally:
            step.rule, step.descent_loss, step.selects = own
        return result, before, self.weights()


@contextmanager
def precision_of(lab: Laboratory) -> Iterator[None]:
    """Compute inside in the configured precision, by autocast."""
    dtype = DTYPES[lab.config.train.precision]
    with torch.autocast(lab.engine.device.type, dtype, enabled=lab.low, cache_enabled=False):
        yield

r"""Evaluate a run, or any weights of a network, on all ranks, and write the calibration report.

    accelerate launch --config_file configs/accelerate/node_ddp.yaml recipes/evaluate.py RUN
    accelerate launch ... recipes/evaluate.py --model resnet50 --weights model.safetensors \
        --data 'SHARDS' --output DIR

`flatcal evaluate` does the same in one process.
"""

from flatcal_dist.ranks.launcher import end_with_the_launcher

end_with_the_launcher()  # before the imports that take seconds

# ruff: noqa: E402
import argparse

from flatcal_dist.cli import evaluate_arguments, run_command
from flatcal_dist.config import CommandLine, ConfigError
from flatcal_dist.printing import never_fail
from flatcal_dist.ranks.launcher import give_up

if __name__ == "__main__":
    never_fail()
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluate_arguments(parser)
    try:
        arguments = parser.parse_args()
    except ConfigError as error:
        give_up(str(error))
    run_command(arguments)

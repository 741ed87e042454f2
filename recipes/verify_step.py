r"""Check the sharpness-aware step on this cluster before spending days on it.

    accelerate launch --config_file configs/accelerate/node_ddp.yaml recipes/verify_step.py \
        --config configs/imagenet/resnet50_csam.yaml train.precision=bf16

Measures the invariants of the step with the network, engine, precision, rule and scope of a
configuration, prints and saves a table, and exits with 1 if one does not hold. No data is needed.
`--fault NAME` breaks one thing on purpose, which the table must then show.
"""

from flatcal_dist.ranks.launcher import end_with_the_launcher

end_with_the_launcher()  # before the imports that take seconds

from flatcal_dist.verification.command import main  # noqa: E402

if __name__ == "__main__":
    main(__doc__)

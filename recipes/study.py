"""Run a study on this machine, one run after another or several at a time, and write its page.

    python recipes/study.py configs/studies/digits.yaml --processes 2
    python recipes/study.py STUDY.yaml --list         # the runs, their state, their overrides
    python recipes/study.py STUDY.yaml --dry-run      # build each, and say how long they will take
    python recipes/study.py STUDY.yaml --budget 60    # stop after an hour
    python recipes/study.py STUDY.yaml --report       # the page of what is finished
    python recipes/study.py STUDY.yaml --seeds 5 train.epochs=5

The same command again does what is missing. Finished runs are left out, and interrupted runs go on
from their checkpoints. Ctrl-C asks all running runs to stop at a whole step, and starts no other.
The output of each run is in DIRECTORY/logs; --show prints it here instead. The study ends in
DIRECTORY/index.html, results.csv and study.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this code, wherever a copy is

from flatcal_dist.studies.command import main

if __name__ == "__main__":
    main(__doc__)

"""Choose the clips of a manifest that are long, uncut, moving and unique enough for an experiment.

python data_prep/filter_clips.py +exp=129f manifest=clips.jsonl output=kept.jsonl
"""

from exvideo_train.filter_clips import main

if __name__ == "__main__":
    main()

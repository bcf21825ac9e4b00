"""Build the manifest of clips from a data set's metadata and its downloaded videos.

python data_prep/build_manifest.py source=internvid metadata=M.jsonl videos=DIR manifest=clips.jsonl
"""

from exvideo_train.build_manifest import main

if __name__ == "__main__":
    main()

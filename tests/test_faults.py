"""Broken videos and mutated files: what `bench_faults.py` does at length."""

from bench_faults import decode_corpus, load_mutants


def test_every_video_is_right_or_recorded():
    verdicts = decode_corpus(seed=1)
    assert verdicts["whole"] == {"right": 34}
    assert verdicts["not a video"] == {"recorded": 6}
    assert verdicts["cut"]["WRONG"] == 0 and verdicts["cut"]["recorded"] > 60
    # VP8, VP9 and HEVC have no checks of their own: a flipped bit can look like another picture
    assert verdicts["bit rot"]["WRONG"] <= 30


def test_mutated_files_load_or_are_refused():
    for file, counts in load_mutants(seed=1, count=400).items():
        assert counts["WRONG"] == 0, file
        assert counts["loads"] > 0 and counts["refused"] > 0, file

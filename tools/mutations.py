"""Does the test suite notice? python tools/mutations.py [NAME ...]

Changes one line of the package at a time, in a copy of this checkout, runs the tests that should fail then, and lists
the changes that no test noticed: the survivors. Without names, all of MUTATIONS. Exits with status 1 if any survives.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """`before`, which occurs once in `file` (of the package), becomes `after`; `tests`: pytest's arguments."""

    name: str
    file: str
    before: str
    after: str
    tests: str


MUTATIONS = (
    # data
    Mutation(
        "hop as long as the window", "data/views.py",
        "window_step=spec.hop_length", "window_step=spec.n_fft", "tests/test_log_mel.py tests/test_pipeline.py",
    ),
    Mutation(
        "wrong sign of dB", "data/views.py",
        "multiplier=10.0 / spec.std", "multiplier=-10.0 / spec.std", "tests/test_log_mel.py tests/test_pipeline.py",
    ),
    Mutation(
        "noise louder where the SNR is higher", "data/augment.py",
        "math.pow(10.0, snr_db / -20.0)", "math.pow(10.0, snr_db / 20.0)", "tests/test_augment.py -k noise",
    ),
    Mutation(
        "pitch shifted the other way", "data/augment.py",
        "scale, nyquist = 2.0 ** (semitones / 12)", "scale, nyquist = 2.0 ** (-semitones / 12)",
        "tests/test_augment.py -k pitch",
    ),
    Mutation(
        "every rank reads the next rank's part", "data/pipeline.py",
        "shard_id=source.shard_id,", "shard_id=min(source.shard_id + 1, source.num_shards - 1),",
        "tests/test_loader.py tests/test_ranks.py",
    ),
    Mutation(
        "damaged segments are forgotten by the next run", "data/quarantine.py",
        "writer.writerow([now, shard, key, row, song, reason, self._shards.fingerprint])", "pass",
        "tests/test_quarantine.py",
    ),
    # models
    Mutation(
        "no stop-gradient", "models/losses.py",
        "z = z.detach()", "z = z", "tests/test_simsiam.py",
    ),
    Mutation(
        "temperature multiplies", "models/losses.py",
        "z @ z.T / self.settings", "z @ z.T * self.settings", "tests/test_simple.py",
    ),
    Mutation(
        "a row is its own positive", "models/losses.py",
        "return match.fill_diagonal_(False)", "return match", "tests/test_simple.py",
    ),
    Mutation(
        "long segments' vectors weigh more in their song's", "models/encoder.py",
        "song_means(F.normalize(embeddings.float(), dim=1), songs)", "song_means(embeddings.float(), songs)",
        "tests/test_monitor.py tests/test_embed.py",
    ),
    Mutation(
        "ratings are read from the output as it is", "models/joint.py",
        "x = F.normalize(self.rating_norm(h), dim=1)", "x = h", "tests/test_joint.py -k rating",
    ),
    # training
    Mutation(
        "micro-batches' gradients are summed", "training/learner.py",
        "self.scaler.scale(output.loss / self.micro_batches)", "self.scaler.scale(output.loss)",
        "tests/test_micro_batch.py",
    ),
    Mutation(
        "learning rate falls with the batch", "training/learner.py",
        "configured * batch / 256", "configured * 256 / batch", "tests/test_train.py -k learning_rate",
    ),
    Mutation(
        "weight decay is ignored", "training/learner.py",
        "momentum=momentum, weight_decay=settings.weight_decay", "momentum=momentum, weight_decay=0.0",
        "tests/test_train.py -k weight_decay",
    ),
    Mutation(
        "all tags are set, wanted or not", "tracking/run.py",
        "for tag in config.mlflow.auto_tags if tag in known", "for tag in known", "tests/test_train.py -k named_tags",
    ),
    Mutation(
        "ranks give no gradient to each other's rows", "common/distributed.py",
        "        dist.all_reduce(grad)\n", "", "tests/test_ranks.py -m ''",
    ),
    Mutation(
        "a resumed run starts its epoch again", "training/run.py",
        'self.data.loader.load_state_dict(resumed["loaders"][self.world.rank])', "pass",
        "tests/test_train.py -k killed",
    ),
    Mutation(
        "a resumed run has another random state", "training/run.py",
        'checkpoint.set_rng_state(resumed["rng"][self.world.rank], self.world.device)', "pass",
        "tests/test_train.py tests/test_checkpoint.py",
    ),
    Mutation(
        "validation in training mode", "training/validation.py",
        "self.learner.encoder.eval()", "self.learner.encoder.train()", "tests/test_validation.py tests/test_train.py",
    ),
    Mutation(
        "a damaged checkpoint takes the place of the one before", "training/checkpoint.py",
        "if is_intact(path):  #", "if path.exists():  #", "tests/test_checkpoint.py",
    ),
    # packing
    Mutation(
        "split by song where it should be by album", "packing/assign_split.py",
        'if split_by == "song":', "if split_by:", "tests/test_shards.py -k album",
    ),
    Mutation(
        "a song's last segment says a wrong start", "packing/segments.py",
        "yield Segment(start - length + filled, length, pcm)", "yield Segment(start, length, pcm)",
        "tests/test_songs.py",
    ),
    Mutation(
        "remainders below half a segment are kept", "packing/segments.py",
        "elif 2 * filled >= length:", "elif filled:", "tests/test_songs.py",
    ),
    # evaluation and recommendation
    Mutation(
        "whitened by half only where songs are few", "evaluation/knn.py",
        "np.divide(1, variance**0.25,", "np.divide(1, variance**0.5,", "tests/test_knn.py",
    ),
    Mutation(
        "another file of the recording is a neighbour", "evaluation/knn.py",
        "distance[groups[0][rows, None] == groups[1]] = np.inf", "pass",
        "tests/test_nearest_song.py tests/test_probes.py -k 'not ends_with'",
    ),
    Mutation(
        "albums on both sides of the split by album", "evaluation/folds.py",
        'if split == "album":', 'if split == "song":', "tests/test_probes.py",
    ),
    Mutation(
        "errors of either sign cancel out", "evaluation/metrics.py",
        "np.mean(np.abs(truth - predicted))", "np.mean(truth - predicted)", "tests/test_probes.py",
    ),
    Mutation(
        "a larger error is better", "evaluation/metrics.py",
        "np.mean((truth - predicted) ** 2), -1)", "np.mean((truth - predicted) ** 2), 1)", "tests/test_probes.py",
    ),
    Mutation(
        "the given songs recommend themselves", "recommendation/choose.py",
        "candidate &= ~np.isin(library.recording, library.recording[seeds])", "pass", "tests/test_recommend.py",
    ),
)  # fmt: skip


def mutated(mutation: Mutation, copy: Path) -> str:
    """Run the mutation's tests in the copy; "noticed", "SURVIVED" or what went wrong."""
    path = copy / "simsiam_dali" / mutation.file
    text = path.read_text()
    if text.count(mutation.before) != 1:
        return f"not applied: {mutation.file} has the line {text.count(mutation.before)} times"
    path.write_text(text.replace(mutation.before, mutation.after))
    try:
        words = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *shlex.split(mutation.tests)]
        env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], cwd=copy, env=env, capture_output=True, text=True, timeout=1800
        )
    finally:
        path.write_text(text)
    if done.returncode in (0, 1):
        return "SURVIVED" if done.returncode == 0 else "noticed"
    return f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="words of a mutation's name (default: all)")
    names = parser.parse_args().names
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    results = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        copy = Path(folder) / "checkout"
        files = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout.decode()  # fmt: skip
        for name in filter(None, files.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, copy / name)
        for mutation in chosen:
            began = time.monotonic()
            results.append(mutated(mutation, copy))
            print(f"{results[-1]:9} {time.monotonic() - began:4.0f} s  {mutation.file}: {mutation.name}", flush=True)
    noticed = results.count("noticed")
    print(f"{noticed} of {len(chosen)} noticed")
    sys.exit(noticed != len(chosen))


if __name__ == "__main__":
    main()

"""Self-supervised embeddings of a music library: WebDataset shards, a DALI data graph, SimSiam training."""

import os

# On a CPU, DALI's threads and torch's share the cores. torch's OpenMP threads spin while they wait for each other, and
# a spinning thread keeps the one it waits for off its core: a ResNet-18 step on two busy cores took 5 times as much
# CPU time. This is read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

"""What a busy machine costs a training step of several threads, by how long these wait for each other by spinning.

python scripts/bench/threads.py [--threads 2] [--seconds 10] [--width 1.0]

MobileNet-V2, batch 64 at 32x32, in images/s: alone, and beside one program that keeps a core busy. r2's commands set
GOMP_SPINCOUNT=1000 unless it is set already.
"""

import argparse
import os
import subprocess
import sys

STEP = """
import sys, time, torch
from r2 import models
threads, seconds, width = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
torch.set_num_threads(threads)
model = models.mobilenet_v2(10, width)
images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
optimizer = torch.optim.SGD(model.parameters(), 0.01)

def step():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()

step()
began, steps = time.monotonic(), 0
while time.monotonic() - began < seconds:
    step()
    steps += 1
print(64 * steps / (time.monotonic() - began))
"""

parser = argparse.ArgumentParser()
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--seconds", type=float, default=10.0)
parser.add_argument("--width", type=float, default=1.0)
arguments = parser.parse_args()


def speed(spin: str | None) -> float:
    env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", STEP, *map(str, (arguments.threads, arguments.seconds, arguments.width))]
    done = subprocess.run(
        command, env=env | ({"GOMP_SPINCOUNT": spin} if spin else {}), stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout)


print(f"{arguments.threads} threads{'alone':>20}{'beside a program':>20}")
for spin in (None, "1000"):
    alone = speed(spin)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = speed(spin)
    finally:
        busy.kill()
        busy.wait()
    print(f"{'GOMP_SPINCOUNT=' + spin if spin else 'default':20}{alone:9.1f}{beside:20.1f}", flush=True)

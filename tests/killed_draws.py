"""Draw a sweep of 600 pictures undisturbed, by a process that is killed 20 times, and by two of
them at once. Arguments: a folder. With `ray` as second argument: by Ray, with an actor that is
killed. The file `FOLDER/NAME.log` gets the keys of all pictures that were drawn."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import cf_guidance.lab.draw as lab_draw
from cf_guidance.lab.draw import Painter, draw, draw_with_ray, measure_pictures
from cf_guidance.lab.fashion import quiet
from cf_guidance.lab.plan import Sweep
from cf_guidance.lab.store import key_of

BATCH = 10
PROMPTS = [
    'a red sneaker on a blue background',
    'a green dress on a white background',
    'a purple bag on an orange background',
    'a yellow coat on a black background',
]


class Measure:
    "Measure pictures, write down their keys, and kill this process once if there is a `knife`."

    def __init__(self, log, knife=None):
        self.log, self.knife, self.calls = str(log), knife and str(knife), 0

    def __call__(self, pixels, requests):
        self.calls += 1
        if self.knife and self.calls == 3:
            try:
                os.close(os.open(self.knife, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        lines = ''.join(f'{key_of(r)}\n' for r in requests)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(log, lines.encode())
        os.close(log)
        return measure_pictures(pixels, requests)


def start(sweep, folder, shard):
    "Draw in a new process, with the pipeline of this one."
    pid = os.fork()
    if not pid:
        measure = Measure(f'{folder}.log')
        draw(sweep, folder, batch_size=BATCH, shard=shard, measure=measure, progress=False)
        os._exit(0)
    return pid


def wait_for_parts(folder, new):
    "Wait until there are some more parts."
    want = len(list(folder.glob('part-*.parquet'))) + new
    until = time.monotonic() + 60
    while len(list(folder.glob('part-*.parquet'))) < want and time.monotonic() < until:
        time.sleep(0.002)


def interrupted(sweep, folder, shards, kills):
    "Draw in `shards` processes at once, which are killed `kills` times in all."
    folder.mkdir()
    chance, killed = random.Random(0), 0
    while killed < kills:
        pids = [start(sweep, folder, (i, shards)) for i in range(shards)]
        new = chance.randrange(3)
        wait_for_parts(folder, new)
        time.sleep(chance.uniform(0, 0.05 if new else 1.0))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    pids = [start(sweep, folder, (i, shards)) for i in range(shards)]
    assert not any(os.waitpid(pid, 0)[1] for pid in pids)


def load_once(request):
    "Let processes that are forked from this one find the pipeline loaded."
    painter = Painter()
    painter.load(request)
    painter([request])
    painter.pipeline.load = lambda: painter.pipeline
    lab_draw.MinimalDiffusion = lambda *args, **kwargs: painter.pipeline


def main(folder):
    sweep = Sweep(prompt=PROMPTS, seed=range(50), w=[2.0, 4.0, 8.0], steps=1)
    load_once(sweep.requests[0])
    for name, shards, kills in (('calm', 1, 0), ('killed', 1, 20), ('shards', 2, 20)):
        begin = time.perf_counter()
        interrupted(sweep, folder / name, shards, kills)
        print(f'{name}: {time.perf_counter() - begin:.1f} s')


def main_ray(folder):
    sweep = Sweep(prompt=PROMPTS, seed=range(10), w=[2.0, 4.0, 8.0], steps=1)
    draw(sweep, folder / 'calm', batch_size=BATCH, progress=False)
    measure = Measure(folder / 'ray.log', folder / 'knife')
    draw_with_ray(sweep, folder / 'ray', 2, batch_size=BATCH, measure=measure)
    draw_with_ray(sweep, folder / 'ray', 2, batch_size=BATCH, measure=measure)


if __name__ == '__main__':
    quiet()
    (main_ray if 'ray' in sys.argv else main)(Path(sys.argv[1]))

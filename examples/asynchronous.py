"""Train next to other tasks of an event loop, and stop by cancelling: the run is saved first.

python examples/asynchronous.py [STEPS]
"""

import asyncio
import contextlib
import sys
import tempfile

from distrust import DistrustTrainer, TrainConfig
from distrust.training.events import Event, StepEnded


async def show(trainer: DistrustTrainer) -> None:
    """Another task: it reads the state of the run, like the handler of a web page."""
    while True:
        state = trainer.state
        if state.step:
            print(f"step {state.step} of {state.max_steps}, loss {state.metrics['loss']:.3f}")
        await asyncio.sleep(0.5)


async def main(out: str, steps: int) -> None:
    """Train, cancel after half of the steps, and resume to the end."""
    loop, half_way = asyncio.get_running_loop(), asyncio.Event()

    def watch(event: Event) -> None:  # on the training thread: hand over to the event loop
        if isinstance(event, StepEnded) and event.step == steps // 2:
            loop.call_soon_threadsafe(half_way.set)

    trainer = DistrustTrainer(TrainConfig(out=out, max_steps=steps), observers=[watch])
    shown = asyncio.create_task(show(trainer))

    training = asyncio.create_task(trainer.train_async())
    await half_way.wait()
    training.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await training  # until its checkpoint is durable
    print(f"cancelled: {trainer.state.checkpoint} is saved")

    ended = await trainer.train_async()
    shown.cancel()
    print(f"{ended.reason} at step {ended.step}: state digest {ended.state_digest}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder, steps=int(sys.argv[1]) if len(sys.argv) > 1 else 20))

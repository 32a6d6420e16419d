"""Credit, the compute thread and ports, without a cluster."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from serving.replica import ComputeThread, Credit
from serving.start import ServeStartError, bindable_port


def test_credit_holds_a_frame_back_until_it_is_granted() -> None:
    async def main() -> None:
        credit = Credit(2)
        await credit.wait_for(1)
        waiter = asyncio.create_task(credit.wait_for(3))
        for num_frames in (3, 2, 3):
            credit.raise_to(num_frames)
            await asyncio.sleep(0)
        assert not waiter.done()
        credit.raise_to(4)
        await asyncio.wait_for(waiter, 1)

    asyncio.run(main())


def test_all_work_is_done_in_order_on_one_thread_while_the_loop_answers() -> None:
    async def main() -> None:
        work, release = ComputeThread(1), threading.Event()
        seen: list[int] = []

        def step(number: int) -> int:
            release.wait(5)
            seen.append(number)
            return threading.get_ident()

        tasks = [asyncio.create_task(work(step, number)) for number in range(4)]
        await asyncio.sleep(0.02)
        assert seen == []
        release.set()
        assert len(set(await asyncio.gather(*tasks)) - {threading.get_ident()}) == 1
        assert seen == [0, 1, 2, 3]

    asyncio.run(main())


def test_a_taken_port_is_refused_and_0_finds_a_free_one() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServeStartError, match=f"127.0.0.1:{port}.*another port"):
            bindable_port("127.0.0.1", port)
        assert bindable_port("127.0.0.1", 0) not in (0, port)

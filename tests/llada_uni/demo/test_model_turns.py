import asyncio
import threading
import time
from contextlib import aclosing

import pytest
import torch

from llada_uni.demo.image_work import ImageRequest, make_images
from llada_uni.demo.model_turns import ModelTurns, VisitorGone


def test_visitors_take_turns_and_get_their_own(demo):
    wishes = [ImageRequest(prompt, seed=seed) for seed, prompt in enumerate(("a red apple", "cherries"))]

    async def visit(wish: ImageRequest) -> list:
        work = lambda pipe, report: make_images(pipe, wish, report)  # noqa: E731
        return [update async for update in demo.turns.on_images(work)]

    async def both() -> list:
        return await asyncio.gather(*(visit(wish) for wish in wishes))

    together, alone = asyncio.run(both()), [asyncio.run(visit(wish)) for wish in wishes]
    images = [[updates[-1].images[0].tobytes() for updates in visits] for visits in (together, alone)]
    assert images[0] == images[1] and images[0][0] != images[0][1]


def test_work_ends_at_the_next_report_of_a_visitor_who_leaves(demo):
    ended, num_reports = threading.Event(), 0

    def work(pipe, report):
        nonlocal num_reports
        try:
            while True:
                num_reports += 1
                report("news")
                time.sleep(0.01)
        except VisitorGone:
            ended.set()
            raise

    async def leave() -> None:
        async with aclosing(demo.turns.on_images(work)) as updates:
            assert await anext(updates) == "news"

    asyncio.run(leave())
    assert ended.wait(10)
    before = num_reports
    time.sleep(0.1)
    assert num_reports == before


def test_who_leaves_before_his_turn_does_not_get_it(demo):
    goes_on, has_begun = threading.Event(), []

    async def visit(work) -> list:
        return [update async for update in demo.turns.on_images(work)]

    async def both() -> None:
        first = asyncio.ensure_future(visit(lambda pipe, report: goes_on.wait(10)))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(visit(lambda pipe, report: has_begun.append(True)), 0.2)
        goes_on.set()
        await first
        await visit(lambda pipe, report: None)  # whose turn is after theirs

    asyncio.run(both())
    assert not has_begun


def test_gradients_are_off_in_the_thread_of_images(demo):
    async def look() -> list:
        return [update async for update in demo.turns.on_images(lambda pipe, report: report(torch.is_grad_enabled()))]

    assert asyncio.run(look()) == [False]


def test_what_work_raises_reaches_its_visitor(demo):
    def fail(pipe, report):
        raise ValueError("no")

    async def visit() -> None:
        async for _ in demo.turns.on_images(fail):
            pass

    with pytest.raises(ValueError, match="^no$"):
        asyncio.run(visit())


def test_answers_come_block_by_block_and_end_when_nobody_listens(demo, pipe):
    messages = [{"role": "user", "content": "what is this?"}]

    async def listen() -> list[str]:
        return [text async for text in demo.turns.answer(messages, 40)]

    texts = asyncio.run(listen())
    assert texts[-1] == pipe.chat(messages, max_new_tokens=40)
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))

    async def leave() -> None:
        async with aclosing(demo.turns.answer(messages, 900, eos_token_id=5)) as texts:
            await anext(texts)

    asyncio.run(leave())
    deadline = time.monotonic() + 20
    while demo.turns.engine.num_texts_running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert demo.turns.engine.num_texts_running == 0 and len(demo.turns.engine.texts) == 0


def test_a_story_is_that_of_the_pipeline(demo, pipe):
    prompt = "a story of 2 hours from three o'clock"

    async def listen() -> list:
        return [part async for part in demo.turns.tell(prompt, 4, 2048, seed=0)]

    parts, expected = asyncio.run(listen()), pipe.interleave(prompt, generator=torch.Generator().manual_seed(0))
    assert [part if isinstance(part, str) else part.size for part in parts] == [
        part if isinstance(part, str) else part.size for part in expected
    ]
    assert [type(part) is str for part in parts] == [True, False, True, False]


def test_a_conversation_that_is_too_long_is_refused(demo):
    async def ask() -> None:
        async for _ in demo.turns.answer([{"role": "user", "content": "moon " * 2000}], 8):
            pass

    with pytest.raises(ValueError, match="shorten it"):
        asyncio.run(ask())


def test_work_ends_when_the_demo_is_stopped(pipe):
    turns, has_begun = ModelTurns(pipe), threading.Semaphore(0)

    def work(pipe, report):
        has_begun.release()
        while True:
            report(None)
            time.sleep(0.01)

    async def draw() -> None:
        async for _ in turns.on_images(work):
            pass

    async def ask() -> None:
        async for _ in turns.answer([{"role": "user", "content": "hello"}], 900, eos_token_id=5):
            has_begun.release()

    async def visit() -> None:
        await asyncio.gather(draw(), ask(), return_exceptions=True)

    visitors = threading.Thread(target=asyncio.run, args=(visit(),), daemon=True)
    visitors.start()
    assert has_begun.acquire(timeout=20) and has_begun.acquire(timeout=20)
    stopping = threading.Thread(target=turns.stop, daemon=True)
    stopping.start()
    for thread in (stopping, visitors):
        thread.join(20)
        assert not thread.is_alive()

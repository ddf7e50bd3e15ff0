"""Queues, jobs, and clients that leave, without a model."""

import asyncio
import threading
import time
from contextlib import suppress

import pytest
import torch
from starlette.requests import ClientDisconnect

from llada_uni.answers import Answer
from llada_uni.serving.chat import AnswerStream
from llada_uni.serving.chat_answers import TextAnswer
from llada_uni.serving.clients import while_connected
from llada_uni.serving.gate import LATER_STATUS
from llada_uni.serving.jobs import EngineBusy, EngineStopped, Job, JobQueue, TextJob


def test_a_queue():
    queue: JobQueue[Job] = JobQueue(2)
    jobs = [Job(), Job(), Job()]
    queue.put(jobs[0])
    queue.put(jobs[1])
    with pytest.raises(EngineBusy):
        queue.put(jobs[2])
    jobs[0].cancel()
    queue.put(jobs[2])  # a cancelled one takes no place
    assert queue.wait() and queue.take(lambda job: True, 1) == [jobs[1]]
    jobs[2].cancel()
    threading.Timer(0.2, queue.close).start()
    began, cpu = time.perf_counter(), time.thread_time()
    assert not queue.wait()  # nor is there anything to wait for with it
    assert time.perf_counter() - began > 0.1 > time.thread_time() - cpu
    with pytest.raises(EngineStopped):
        queue.put(Job())


def test_results_of_those_who_have_left():
    job = Job()
    job.cancel()
    job.succeed(1)
    job.fail(ValueError())
    assert job.is_cancelled


def test_a_client_that_hangs_up_while_it_waits():
    class Request:
        async def receive(self):
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

    async def ask(seconds):
        job = Job()

        async def wait():
            asyncio.get_running_loop().call_later(seconds, job.succeed, "done")
            return await asyncio.wrap_future(job.result)

        try:
            return await while_connected(Request(), job, wait()), job
        except ClientDisconnect:
            return None, job

    answer, job = asyncio.run(ask(0.01))
    assert answer == "done" and not job.is_cancelled
    answer, job = asyncio.run(ask(5))
    assert answer is None and job.is_cancelled


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_client_that_hangs_up_before_the_first_event(version):
    """Nobody has begun to listen to the answer, so that nobody can stop listening."""

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        if version == "2.4":
            raise OSError
        await asyncio.sleep(10)  # until it is cancelled

    async def ask():
        job = TextJob(torch.zeros(1, dtype=torch.long), 8)
        scope = {"type": "http", "asgi": {"spec_version": version}}
        with suppress(ClientDisconnect):
            await AnswerStream(TextAnswer(job, Answer(None)), {}, False)(scope, receive, send)
        return job, scope

    job, scope = asyncio.run(ask())
    assert job.is_cancelled and scope[LATER_STATUS] == 499

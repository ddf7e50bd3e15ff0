"""Best of n: candidates are sampled, judged by the model that made them or by a reward, and the best is kept."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers.utils.generic import is_flash_attention_requested

from ..input_checks import check_integer
from ..processing_llada_uni import LLaDAUniProcessor
from ..unwrapping import input_device
from ..user_words import encode_words


QUESTION = "What is this?"  # of a model, about its own images
# Tokens of one forward pass, those of two prompts as long as the released model can read.
MAX_TOKENS = 16_384

Reward = Callable[..., Sequence[float]]


def check_candidates(num_candidates: Any, reward: Any) -> None:
    """Raises TypeError or ValueError by the name of the argument."""
    check_integer("num_candidates", num_candidates, minimum=1)
    if reward is not None and not callable(reward):
        raise TypeError(f"`reward` must be callable, got {type(reward).__name__}.")
    if reward is not None and num_candidates == 1:
        raise ValueError("`reward` chooses among candidates, but `num_candidates` is 1.")


def check_can_judge(model: Any) -> None:
    """Raises ValueError if a model cannot judge its own candidates."""
    if is_flash_attention_requested(model.get_decoder().config):
        raise ValueError(
            "`num_candidates` needs a `reward`, or another `attn_implementation`: the model would judge several "
            "blocks in one pass, which flash attention cannot mask."
        )


def check_candidates_differ(settings: Iterable[dict[str, Any]], own: Any) -> None:
    """Of one call's settings some must sample; `own` are the model's, for what they leave out."""
    if not any(
        given.get("do_sample", own.do_sample) and given.get("temperature", own.temperature) != 0 for given in settings
    ):
        raise ValueError(
            "`num_candidates` would all be the same without `do_sample=True`, and with a `temperature` of 0."
        )


def candidate_generators(generators: list[torch.Generator], num_candidates: int) -> list[torch.Generator]:
    """Of each generator one for every candidate, so that a row's candidates do not depend on its batch."""
    if num_candidates == 1:
        return generators
    return [
        torch.Generator(generator.device).manual_seed(seed)
        for generator in generators
        for seed in torch.randint(2**63 - 1, (num_candidates,), generator=generator, device=generator.device).tolist()
    ]


def rewards_of(reward: Reward, num_rows: int, **columns: Any) -> list[float]:
    """
    Scores by a reward as trl's and [`LLaDAUniGRPOTrainer`]'s: a callable that takes columns by their names and gives
    a number for each row.

    Raises:
        ValueError: if it gives other than `num_rows` finite numbers.
    """
    given = reward(**columns)
    scores = numbers_of(given)
    if scores is None or len(scores) != num_rows or None in scores:
        raise ValueError(f"`reward` must give a finite number for each of {num_rows} candidates, got {given!r}.")
    return cast(list[float], scores)


def numbers_of(given: Any) -> list[float | None] | None:
    """What a reward gave, as finite numbers, `None` among them; `None` alone for what is no list of these."""
    if isinstance(given, str):
        return None
    try:
        numbers = [None if number is None else float(number) for number in given]
    except (TypeError, ValueError, RuntimeError):  # no list, or no numbers
        return None
    return numbers if all(number is None or math.isfinite(number) for number in numbers) else None


def best_of(scores: Sequence[float], num_candidates: int) -> list[int]:
    """Of each `num_candidates` rows that stand together the one with the highest score; the first of equals."""
    starts = range(0, len(scores), num_candidates)
    return [max(range(start, start + num_candidates), key=scores.__getitem__) for start in starts]


@torch.no_grad()
def answer_log_probs(model: Any, prompts: Sequence[torch.Tensor], answers: Sequence[torch.Tensor]) -> list[float]:
    r"""
    How probable a model finds answers: the mean over their tokens of the log-probability with all tokens of the block
    hidden, given the blocks before it. No bound on the likelihood (that is [`completion_likelihood`], in as many
    passes as it takes samples), but an order, for one row of a batch and block of an answer.

    Args:
        model: With `get_decoder()` and `lm_head`.
        prompts (sequence of `torch.LongTensor` of shape `(length,)`): Images stand in them as tokens of their codes.
        answers (the same): At least a token each.

    Returns:
        One for each row, in nats a token.
    """
    block_length, parts, rows = model.settle_generation_config(None, {}).block_length, [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids, start = [*prompt.tolist(), *answer.tolist()], len(prompt)
        while start < len(ids):
            end = (start // block_length + 1) * block_length
            parts.append((ids[:start], ids[start:end]))
            rows.append(row)
            start = end
    totals = [0.0] * len(prompts)
    for index, log_probs in _predictions(model, [(before, len(hidden)) for before, hidden in parts]):
        hidden = torch.tensor(parts[index][1], device=log_probs.device)
        totals[rows[index]] += float(log_probs.gather(-1, hidden[:, None]).sum())
    return [total / len(answer) for total, answer in zip(totals, answers, strict=True)]


@torch.no_grad()
def prompt_recall(
    model: Any,
    processor: LLaDAUniProcessor,
    prompts: Sequence[str],
    image_codes: Sequence[torch.Tensor],
    question: str = QUESTION,
) -> list[float]:
    r"""
    How much of a prompt a model would say of the image that it has made of it, as codes: of each token of the prompt
    the probability at the place of the answer where it is highest, in the mean over different tokens.

    One forward pass a batch, whatever the prompt says. As these are means of probabilities, and not of their
    logarithms, words that no answer has ("please draw ...") weigh little: the likelihood of the prompt as an answer
    (VisualGPTScore, arXiv 2306.01879) finds the better image of a bare name more often, of any other prompt none.

    Args:
        model ([`LLaDAUniForConditionalGeneration`]): The judge.
        processor ([`LLaDAUniProcessor`]): Its processor.
        prompts (`Sequence[str]`): What the images should show.
        image_codes (sequence of `torch.LongTensor` of shape `(H, W)`): One for each prompt.
        question (`str`, defaults to `"What is this?"`): What is asked about them.

    Returns:
        One for each image, 0 to 1.

    Raises:
        ValueError, TypeError: as the processor's call does.
    """
    contexts, words = [], []
    for prompt, codes in zip(prompts, image_codes, strict=True):
        asked = processor(text=question, image_codes=codes, task="understanding")["input_ids"][0].tolist()
        ids = encode_words(processor.tokenizer, prompt)
        contexts.append((asked, len(ids)))
        words.append(sorted(set(ids)))
    scores = [0.0] * len(contexts)
    for index, log_probs in _predictions(model, contexts, whole_blocks=True):
        scores[index] = float(log_probs.amax(dim=0)[words[index]].exp().mean())
    return scores


def _predictions(
    model: Any, contexts: Sequence[tuple[list[int], int]], whole_blocks: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """
    What a model predicts behind ids, all at once.

    Args:
        contexts: Ids, and how many masks behind them are predicted.
        whole_blocks: Predict the rest of the last block, too.

    Yields:
        The number of a context and log-probabilities `(masks, vocabulary)`, one row at a time: logits are large.
    """
    config = model.settle_generation_config(None, {})
    block_length, backbone = config.block_length, model.get_decoder()
    lengths = [-(-(len(ids) + count) // block_length) * block_length for ids, count in contexts]
    order = sorted(range(len(contexts)), key=lambda index: -lengths[index])  # the longest first
    while order:
        length = lengths[order[0]]
        batch, order = order[: max(1, MAX_TOKENS // length)], order[max(1, MAX_TOKENS // length) :]
        # What stands behind a block is not seen by it: rows may end in masks, however many.
        rows = torch.full((len(batch), length), config.mask_token_id)
        for row, index in zip(rows, batch, strict=True):
            row[: len(contexts[index][0])] = torch.tensor(contexts[index][0])
        rows = rows.to(input_device(backbone))
        states = backbone(rows, use_cache=False, block_length=block_length).last_hidden_state
        for row, index in zip(states, batch, strict=True):
            start, count = len(contexts[index][0]), contexts[index][1]
            end = lengths[index] if whole_blocks else start + count
            yield index, model.lm_head(row[start:end]).float().log_softmax(dim=-1)

"""Which token is picked: the reference against transformers' own warpers, the Triton kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from conftest import run_in_interpreter
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from transformers_async_cb.sampling import PARAMETER_WORDS, Flavour, Parameters, pick, reference


SAMPLED, FILTERED, LOGPROBS = Flavour(sampled=True), Flavour(True, True), Flavour(True, True, True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parameters_of(rows: int, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed: int = 0) -> Parameters:
    """The same for all rows, but for the seeds."""
    g = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**31), 2**31, (2, rows), generator=g, dtype=torch.int32)
    return Parameters(
        torch.full((rows,), temperature),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.full((rows,), top_k, dtype=torch.int32),
        *seeds,
    )


def random_parameters(rows: int, generator: torch.Generator) -> Parameters:
    def one_of(*values: float) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]

    return parameters_of(rows, seed=int(torch.randint(2**31, (), generator=generator)))._replace(
        temperature=one_of(0.0, 0.3, 0.7, 1.0, 2.0, 5.0),
        top_p=one_of(1.0, 1.0, 0.01, 0.5, 0.9, 0.99, 0.9999),
        top_k=one_of(0, 0, 1, 2, 20, 50, 900, 2**31 - 1).int(),
        min_p=one_of(0.0, 0.0, 0.0, 0.05, 0.5, 1.0),
    )


def positions_of(rows: int) -> torch.Tensor:
    return torch.arange(1, rows + 1, dtype=torch.int32)


def logits_of(rows: int, vocabulary: int, ties: bool = False, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.mul(2).round().div(2) if ties else logits


def warped(logits: torch.Tensor, temperature=1.0, top_p=1.0, top_k=0, min_p=None) -> torch.Tensor:
    """What `generate` draws from, computed in float64."""
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return MinPLogitsWarper(min_p)(None, scores) if min_p else scores


SETTINGS = [
    {"top_k": 1}, {"top_k": 50}, {"top_k": 999}, {"top_k": 5000}, {"top_p": 0.001}, {"top_p": 0.5}, {"top_p": 0.999},
    {"min_p": 0.01}, {"min_p": 1.0}, {"top_k": 20, "top_p": 0.9, "temperature": 0.6},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.02, "temperature": 3.0},
]  # fmt: skip


class TestWhatMayBeDrawn:
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_is_what_the_warpers_keep(self, settings: dict) -> None:
        logits = logits_of(40, 1000)
        kept = reference.kept(logits, parameters_of(40, **settings))
        assert torch.equal(kept, warped(logits, **settings) > -torch.inf)

    @pytest.mark.parametrize("settings", [s for s in SETTINGS if "top_p" not in s], ids=str)
    def test_is_what_the_warpers_keep_of_ties(self, settings: dict) -> None:
        logits = logits_of(40, 1000, ties=True)
        kept = reference.kept(logits, parameters_of(40, **settings))
        assert torch.equal(kept, warped(logits, **settings) > -torch.inf)

    @pytest.mark.parametrize("settings", [s for s in SETTINGS if "top_p" in s], ids=str)
    def test_is_as_much_of_the_last_ties_as_the_warpers_keep_for_top_p(self, settings: dict) -> None:
        logits = logits_of(40, 1000, ties=True)
        kept = reference.kept(logits, parameters_of(40, **settings))
        theirs = warped(logits, **settings) > -torch.inf
        for row, ours, them in zip(logits, kept, theirs, strict=True):
            assert torch.equal(row[ours].sort().values, row[them].sort().values)

    def test_is_the_lowest_ids_of_the_last_ties_for_top_p(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
        for share, expected in ((0.2, [1]), (0.25, [1, 3]), (0.72, [1, 3, 5]), (0.75, [0, 1, 3, 5])):
            kept = reference.kept(logits, parameters_of(1, top_p=share))
            assert kept[0].nonzero()[:, 0].tolist() == expected

    def test_is_everything_in_a_greedy_row(self) -> None:
        parameters = parameters_of(3, top_k=2, top_p=0.5, min_p=0.9)
        parameters.temperature[1] = 0
        assert reference.kept(logits_of(3, 100), parameters).sum(1).tolist() == [1, 100, 1]


class TestTheDraw:
    @pytest.mark.parametrize("same", ["position", "seed"])
    @pytest.mark.parametrize("settings", [{}, {"temperature": 2.5}, {"top_k": 7, "top_p": 0.9}], ids=str)
    def test_follows_the_distribution(self, settings: dict, same: str) -> None:
        """Chi-square; its 0.1 % quantile, by Wilson and Hilferty."""
        draws, logits = 20_000, logits_of(1, 60, seed=3).div(2)
        parameters = parameters_of(draws, **settings)
        if same == "seed":
            parameters.seed_low[:], parameters.seed_high[:] = 5, -6
        positions = positions_of(draws) if same == "seed" else torch.full((draws,), 9, dtype=torch.int32)
        ids, _ = pick(logits.expand(draws, -1), parameters, positions, FILTERED)
        expected = warped(logits, **settings)[0].softmax(-1) * draws
        counts = torch.bincount(ids, minlength=60)
        assert counts[expected == 0].sum() == 0
        often = expected >= 5
        freedom = int(often.sum())
        expected = torch.cat([expected[often], expected[~often].sum()[None].clamp_min(1e-9)])
        counts = torch.cat([counts[often], counts[~often].sum()[None]])
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3

    def test_has_noise_that_neither_a_neighbour_nor_the_next_position_shares(self) -> None:
        zeros = torch.zeros(64, dtype=torch.int32)
        noise = reference.exponential(zeros, zeros, positions_of(64), 20_000).double() * 0.6931471805599453
        assert noise.min() > 0
        assert abs(noise.mean() - 1) < 4 / noise.numel() ** 0.5
        assert abs(noise.var() - 1) < 4 * (8 / noise.numel()) ** 0.5
        assert abs((noise < 0.001).double().mean() / 0.0009995 - 1) < 4 / (0.001 * noise.numel()) ** 0.5
        for one, other in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
            assert abs(((one - 1) * (other - 1)).mean()) < 4 / one.numel() ** 0.5

    def test_depends_on_every_word_of_the_seed_and_on_the_position(self) -> None:
        logits, parameters, positions = torch.zeros(1, 5000), parameters_of(1), positions_of(1)
        ids = {
            int(pick(logits, variant, at, SAMPLED)[0])
            for variant in (
                parameters,
                parameters._replace(seed_low=parameters.seed_low + 1),
                parameters._replace(seed_high=parameters.seed_high + 1),
            )
            for at in (positions, positions + 1)
        }
        assert len(ids) == 6

    def test_is_the_same_alone_and_in_a_batch(self) -> None:
        logits, parameters = logits_of(300, 200), random_parameters(300, torch.Generator().manual_seed(0))
        ids, logprobs = pick(logits, parameters, positions_of(300), LOGPROBS)
        for row in (0, 1, 127, 128, 299):
            only = slice(row, row + 1)
            alone = Parameters(*(column[only] for column in parameters))
            id_, logprob = pick(logits[only], alone, positions_of(300)[only], LOGPROBS)
            assert id_ == ids[only]
            torch.testing.assert_close(logprob, logprobs[only], rtol=0, atol=1e-6)

    def test_reads_parameters_from_the_table_of_the_runner(self) -> None:
        expected = parameters_of(4, 0.7, 0.9, 30, 0.1)
        table = torch.stack([column.view(torch.int32) for column in expected], 1)
        assert table.shape[1] == PARAMETER_WORDS
        assert all(map(torch.equal, Parameters.from_table(table), expected))

    @pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 9, "top_p": 0.8}], ids=str)
    def test_has_the_log_probability_of_what_it_was_drawn_from(self, settings: dict) -> None:
        logits = logits_of(50, 300)
        ids, logprobs = pick(logits, parameters_of(50, **settings), positions_of(50), LOGPROBS)
        expected = warped(logits, **settings).log_softmax(-1).gather(1, ids[:, None].long())[:, 0]
        torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=5e-6)


class TestGreedy:
    @pytest.mark.parametrize("flavour", [Flavour(), SAMPLED, LOGPROBS], ids=str)
    def test_is_the_first_of_the_largest_logits(self, flavour: Flavour) -> None:
        logits = logits_of(200, 500, ties=True)
        ids, _ = pick(logits, parameters_of(200, temperature=0.0, top_k=3), positions_of(200), flavour)
        expected = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(ids, expected.int())

    @pytest.mark.parametrize("flavour", [Flavour(), SAMPLED, LOGPROBS], ids=str)
    def test_is_the_first_nan_if_there_is_one(self, flavour: Flavour) -> None:
        logits = logits_of(2, 500)
        logits[:, 300] = logits[:, 123] = torch.nan
        parameters = parameters_of(2, top_k=1, top_p=0.5)
        parameters.temperature[0] = 0
        assert pick(logits, parameters, positions_of(2), flavour)[0].tolist() == [123, 123]


class TestArithmetic:
    def test_of_masses_is_exp(self) -> None:
        scores = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 12
        assert (reference.mass(scores) / 2**40 - scores.double().exp()).abs().max() < 2e-7
        assert reference.mass(torch.tensor([0.0, -torch.inf, torch.nan, -1e30])).tolist() == [2**40, 0, 0, 0]

    def test_of_logarithms_is_log(self) -> None:
        x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 40
        assert (reference.log(x).double() - x.double().log()).abs().max() < 6e-7
        assert reference.log(torch.ones(1)) == 0


def check_kernels(device: str, sizes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    """Ids of the kernels against the reference's on the CPU where that is quick; returns the number of cases."""
    from transformers_async_cb.sampling import triton

    generator = torch.Generator().manual_seed(0)
    cases = 0
    for rows, vocabulary in sizes:
        for dtype in dtypes:
            for flavour in (Flavour(), Flavour(logprobs=True), SAMPLED, FILTERED, LOGPROBS):
                logits = logits_of(rows, vocabulary, ties=cases % 2 == 1, seed=cases).to(dtype)
                logits[:, torch.randint(vocabulary, (9,), generator=generator)] = -torch.inf
                if cases % 3 == 0:  # among others; of a whole row of infinities the first is taken
                    logits[0] = -torch.inf
                    logits[rows - 1, vocabulary // 2] = (torch.inf, torch.nan, -torch.nan)[cases % 9 // 3]
                if cases % 4 == 0:  # likely tokens beside each other, and many that may be drawn
                    logits[rows // 2, vocabulary // 3 :] = 8
                parameters = random_parameters(rows, generator)
                table = torch.stack([column.view(torch.int32) for column in parameters], 1).to(device)
                on_device = Parameters.from_table(table)
                ids, logprobs = triton.pick(logits.to(device), on_device, positions_of(rows).to(device), flavour)
                if rows * vocabulary > 2**20:
                    there = [x.to(device) for x in (logits, *parameters, positions_of(rows))]
                    logits, parameters, positions = there[0], Parameters(*there[1:-1]), there[-1]
                else:
                    positions, ids = positions_of(rows), ids.cpu()
                    logprobs = logprobs if logprobs is None else logprobs.cpu()
                expected, expected_logprobs = reference.pick(logits, parameters, positions, flavour)
                case = (rows, vocabulary, dtype, flavour, (ids != expected).nonzero()[:, 0].tolist())
                assert torch.equal(ids, expected), case
                if flavour.logprobs:
                    finite = logits.gather(1, ids[:, None].long())[:, 0].isfinite()
                    torch.testing.assert_close(logprobs[finite], expected_logprobs[finite], rtol=0, atol=1e-5)
                cases += 1
    return cases


def test_the_kernels_pick_what_the_reference_picks() -> None:
    assert run_in_interpreter(__file__).split()[-1] == "checked:75"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 300])
@pytest.mark.parametrize("vocabulary", [1000, 32_000, 151_936])
def test_the_kernels_pick_what_the_reference_picks_on_the_gpu(rows: int, vocabulary: int) -> None:
    assert check_kernels("cuda", [(rows, vocabulary)]) == 15


if __name__ == "__main__":
    print(f"checked:{check_kernels('cpu', [(1, 1), (5, 37), (6, 1000), (4, 4096), (3, 9001)])}")

import pytest

from embedmill.errors import ConfigurationError
from embedmill.models import MODELS, find_model, find_tier


def test_every_model_sends_tasks_that_it_knows():
    for model in MODELS.values():
        assert {model.document_task, model.query_task} <= {None, *model.tasks}
        assert ("task" in model.fields) == bool(model.tasks)
        assert ("dimensions" in model.fields) == bool(model.max_dimensions)
        assert ("late_chunking" in model.fields) == bool(model.late_chunking_tokens)


def test_an_unknown_model_is_refused_with_the_near_one():
    with pytest.raises(ConfigurationError, match="did you mean jina/jina-embeddings-v3"):
        find_model("jina/jina-embedding-v3")


def test_an_unknown_tier_is_refused_with_the_choices():
    assert find_tier("free").concurrency == 2
    with pytest.raises(ConfigurationError, match="free, paid, premium"):
        find_tier("zzz")


@pytest.mark.parametrize(("asked", "nearest"), [(2048, 1024), (0, 1), (-3, 1)])
def test_dimensions_out_of_range_name_the_nearest_that_works(asked, nearest):
    with pytest.raises(ConfigurationError, match=f"nearest that works is --dimensions {nearest} "):
        find_model("jina/jina-embeddings-v3").check_dimensions(asked)


def test_a_model_of_one_size_takes_only_that():
    model = find_model("jina/jina-embeddings-v2-base-en")
    assert model.check_dimensions(None) == model.check_dimensions(768) == 768
    with pytest.raises(ConfigurationError, match="say 768"):
        model.check_dimensions(512)


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("jina/jina-embeddings-v3", None, ("retrieval.passage", "retrieval.query")),
        ("jina/jina-embeddings-v3", "retrieval", ("retrieval.passage", "retrieval.query")),
        ("jina/jina-embeddings-v4", "code.passage", ("code.passage", "code.query")),
        ("jina/jina-embeddings-v3", "separation", ("separation", "separation")),
        ("jina/jina-code-embeddings-1.5b", "qa", ("qa.passage", "qa.query")),
        ("jina/jina-embeddings-v2-base-de", None, (None, None)),
    ],
)
def test_a_task_is_split_by_role(name, task, expected):
    assert find_model(name).tasks_by_role(task) == expected


def test_a_task_of_another_generation_is_refused_with_the_choices():
    with pytest.raises(ConfigurationError, match="separation"):
        find_model("jina/jina-embeddings-v3").tasks_by_role("clustering")
    with pytest.raises(ConfigurationError, match="leave --task out"):
        find_model("jina/jina-embeddings-v2-base-en").tasks_by_role("retrieval")

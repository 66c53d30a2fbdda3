import json
from pathlib import Path

import pytest

from mobilemix.errors import InputError, MobilemixError, UnknownNameError
from mobilemix.manifest import dumps
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe, load_recipe, recipe_from, write_recipe

RECIPES = sorted((Path(__file__).parents[1] / "export").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_every_key_is_read_and_paths_are_relative_to_the_file(tmp_path):
    path = write(
        tmp_path,
        """
        model = "affnet_t"
        weights = "w.safetensors"
        target = "onnx"
        precision = "fp32"
        input = "tensor"
        input_shapes = [1, 3, 224, 192]
        mean = [0.5, 0.5, 0.5]
        std = [1, 1, 1]
        opset = 20
        minimum_ios = 17
        labels = "labels.txt"
        tolerance = 1e-4
        max_size_mb = 12
        """,
    )
    assert load_recipe(path) == Recipe(
        model="affnet_t",
        weights=tmp_path / "w.safetensors",
        target="onnx",
        precision="fp32",
        input="tensor",
        input_shapes=((1, 3, 224, 192),),
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
        opset=20,
        minimum_ios=17,
        labels=tmp_path / "labels.txt",
        tolerance=1e-4,
        max_size_mb=12.0,
    )


def test_the_table_of_quantisation(tmp_path):
    path = write(
        tmp_path,
        """
        precision = "int8"
        input_shapes = [1, 3, 64, 64]
        [quantization]
        data = "pictures"
        samples = 64
        seed = 3
        observer = "entropy"
        format = "s8s8"
        equalization = "smooth"
        bias_correction = true
        rounding = "adaround"
        [quantization.layers]
        "stem*" = "float"
        head = "float"
        """,
    )
    recipe = load_recipe(path)
    assert recipe.quantization == Quantization(
        data=str(tmp_path / "pictures"),
        samples=64,
        seed=3,
        observer="entropy",
        format="s8s8",
        equalization="smooth",
        bias_correction=True,
        rounding="adaround",
        layers=(("stem*", "float"), ("head", "float")),
    )
    table = json.loads(dumps(recipe))
    assert recipe_from({key: value for key, value in table.items() if value is not None}, base=Path()) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantization = 3", "'quantization' cannot be 3"),
        ("[quantization]\nobservr = 'mse'", "observer"),
        ("[quantization]\nsamples = '9'", "'quantization.samples' cannot be '9'"),
        ("[quantization]\nsamples = 0", "at least 1"),
        ("[quantization]\nlayers = ['a']", "'quantization.layers' cannot be"),
        ("[quantization.layers]\nstem = 'flaot'", "float"),
    ],
)
def test_a_table_of_quantisation_that_cannot_be(tmp_path, text, message):
    with pytest.raises(MobilemixError, match=message):
        load_recipe(write(tmp_path, text))


def test_the_shipped_photographs_are_no_path(tmp_path):
    recipe = load_recipe(write(tmp_path, '[quantization]\ndata = "builtin"'))
    assert recipe.quantization == Quantization()


def test_options_of_the_builder_of_an_engine(tmp_path):
    text = """
        target = "tensorrt"
        dynamic_batch = [1, 8, 64]
        workspace_mb = 512
        timing_cache = "times"
        hardware_compatibility = "ampere_plus"
        version_compatible = true
        """
    assert load_recipe(write(tmp_path, text)) == Recipe(
        target="tensorrt",
        dynamic_batch=(1, 8, 64),
        workspace_mb=512,
        timing_cache=tmp_path / "times",
        hardware_compatibility="ampere_plus",
        version_compatible=True,
    )


@pytest.mark.parametrize(
    "option", ["workspace_mb = 1", "timing_cache = 'x'", "version_compatible = true", "hardware_compatibility = 'none'"]
)
def test_a_target_without_an_engine_has_no_options_for_it(tmp_path, option):
    with pytest.raises(InputError, match=rf"the target onnx has no {option.split()[0]}; only tensorrt"):
        load_recipe(write(tmp_path, f"target = 'onnx'\n{option}"))


def test_several_inputs(tmp_path):
    assert load_recipe(write(tmp_path, "input_shapes = [1, 8]\ninput_dtypes = 'int64'")).input_dtypes == ("int64",)
    assert load_recipe(write(tmp_path, "input_shapes = [[1, 3, 8, 8], [1, 4]]")).input_shapes == ((1, 3, 8, 8), (1, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "cannot read the recipe"),
        ("modle = 'x'", "did you mean 'model'"),
        ("model = 3", "'model' cannot be 3"),
        ("opset = true", "'opset' cannot be True"),
        ("opset = 7", "opset 7 is not supported; valid: 18 to 22"),
        ("target = 'onx'", "did you mean 'onnx'"),
        ("precision = 'fp61'", "unknown precision"),
        ("input = 'picture'", "unknown input kind"),
        ("minimum_ios = 12", "valid: 15, 16, 17, 18"),
        ("input_shapes = [1, 0]", "below 1"),
        ("input_shapes = []", "below 1"),
        ("input_shapes = 'x'", "cannot be 'x'"),
        ("input_shapes = [1, 2]\ninput_dtypes = ['int46']", "did you mean 'int64'"),
        ("input_shapes = [1, 2]\ninput_dtypes = ['int64', 'bool']", "2 input dtypes do not fit 1 shapes"),
        ("input_dtypes = [64]", "cannot be"),
        ("mean = [0.5]", "one value a channel"),
        ("mean = [0.5]\nstd = [0.0]", "std above 0"),
        ("tolerance = -1", "above 0"),
        ("tolerance = nan", "above 0"),
        ("max_size_mb = 'big'", "cannot be 'big'"),
    ],
)
def test_what_no_recipe_can_have_is_one_clear_line(tmp_path, text, message):
    with pytest.raises((InputError, UnknownNameError), match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value).strip()


def test_a_missing_file_is_one_clear_line(tmp_path):
    with pytest.raises(MobilemixError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    from mobilemix.models.registry import MODELS

    assert load_recipe(path).model in MODELS


def test_recipes_are_shipped():
    assert RECIPES


ODD = 'a "quoted" name\\ with \x7f, é and 😀'


def test_a_recipe_that_was_written_is_read_as_the_same(tmp_path):
    (tmp_path / "pictures").mkdir()
    recipe = Recipe(
        model=f"{ODD}.py:make",
        weights=tmp_path / ODD,
        target="onnx",
        precision="int8",
        input_shapes=((1, 3, 8, 8), (2,)),
        input_dtypes=("float32", "int64"),
        mean=(0.5,),
        std=(1e-7,),
        dynamic_batch=(1, 2, 4),
        tolerance=1e-4,
        quantization=Quantization(
            data=str(tmp_path / "pictures"), observer="entropy", bias_correction=True, layers=((f"{ODD}/*", "float"),)
        ),
    )
    path = tmp_path / "recipe.toml"
    write_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_files_near_a_written_recipe_are_named_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("out", "weights"):
        (tmp_path / name).mkdir()
    path = tmp_path / "out" / "recipe.toml"
    write_recipe(Recipe(weights=Path("weights", "w.pt"), labels=Path("/elsewhere/labels.txt")), path)
    text = path.read_text()
    assert 'weights = "../weights/w.pt"' in text
    assert 'labels = "/elsewhere/labels.txt"' in text


def test_of_the_same_pattern_written_twice_the_last_counts(tmp_path):
    path = tmp_path / "recipe.toml"
    layers = (("a*", "float"), ("b", "w8"), ("a*", "int8"))
    write_recipe(Recipe(quantization=Quantization(layers=layers)), path)
    assert load_recipe(path).quantization.layers == layers[1:]

import pytest

from mobilemix.errors import MissingDependencyError, MobilemixError, UnknownNameError


def test_an_unknown_name_suggests_the_closest_and_lists_all():
    message = str(UnknownNameError("model", "afnet_t", ["affnet_t", "casvit_xs"]))
    assert message == "unknown model 'afnet_t'; did you mean 'affnet_t'? Valid: affnet_t, casvit_xs"


def test_a_name_like_no_other_gets_only_the_list():
    assert str(UnknownNameError("target", "zzz", ["onnx", "coreml"])) == "unknown target 'zzz'. Valid: coreml, onnx"


def test_a_missing_dependency_names_the_extra():
    assert "pip install 'mobilemix[report]'" in str(MissingDependencyError("matplotlib", "plots", "report"))


@pytest.mark.parametrize("error", MobilemixError.__subclasses__())
def test_every_error_is_in_the_tree_of_the_docstring(error):
    import mobilemix.errors

    if error.__module__ == "mobilemix.errors":
        assert error.__name__ in (mobilemix.errors.__doc__ or "")

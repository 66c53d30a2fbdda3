import subprocess
import sys

import mobilemix


def test_every_public_name_is_there_and_documented():
    for name in mobilemix.__all__:
        value = getattr(mobilemix, name)
        assert value.__doc__, name
        assert getattr(value, "__module__", value.__name__).startswith("mobilemix."), name


def test_no_submodule_shadows_a_public_name():
    import mobilemix.api  # imports most of the package, which sets submodules as attributes

    assert callable(mobilemix.verify)
    assert callable(mobilemix.export)


def test_all_is_sorted_and_listed():
    assert sorted(mobilemix.__all__) == mobilemix.__all__
    assert set(mobilemix.__all__) <= set(dir(mobilemix))


def test_a_name_that_is_not_public_is_an_attribute_error():
    assert not hasattr(mobilemix, "nothing")


def test_importing_the_package_and_asking_for_help_load_no_heavy_module():
    code = (
        "import sys, mobilemix.cli\n"
        "sys.argv = ['mobilemix', 'export', '--help']\n"
        "assert mobilemix.cli.run() == 0\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'onnxscript', 'coremltools', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)

"""The library is compiled once per source, and every way of failing is a sentence."""

import shutil

import pytest

from quantlib.kernels.cpu import build
from quantlib.kernels.cpu import library as cpu


def test_no_compiler_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler: install g\\+\\+"):
        build.build_into(tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of cheese' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    folder = tmp_path / "cache"
    folder.mkdir()
    with pytest.raises(build.BuildError, match="broken failed: fatal error: out of cheese"):
        build.build_into(folder)
    assert not list(folder.iterdir())


def test_a_cache_that_cannot_be_written_is_a_sentence(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"cache folder .*file/quantlib/kernels cannot be"):
        build.build()


def test_the_cache_is_found_again_and_follows_the_sources(monkeypatch, tmp_path, library):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "quantlib" / "kernels"
    folder.mkdir(parents=True)
    name = build.library_name()
    (folder / name).write_bytes(b"")
    assert build.find() == folder / name
    assert build.build() == folder / name  # nothing to compile
    sources = shutil.copytree(build.SOURCES, tmp_path / "src")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.library_name() == name
    with (sources / "driver.cpp").open("a") as source:
        source.write("\n")
    assert build.library_name() != name
    assert build.find() is None


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """`compiled()`: names of what a stand-in for a compiler has made since the last call."""
    log, compiler = tmp_path / "log", tmp_path / "stand-in"
    compiler.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "$COMPILER_VERSION"; exit; fi\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'echo "${{2##*/}}" | tee -a "{log}" > "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("COMPILER_VERSION", "12")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def names():
        made = sorted(log.read_text().split())
        log.write_text("")
        return made

    return names


def test_a_wheel_is_built_of_what_the_same_compiler_made_before(monkeypatch, tmp_path, compiled):
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    library = build.build().name
    everything = compiled()
    units = {path.stem for path in build.SOURCES.glob("*.cpp")}
    assert library in everything
    assert len(everything) > 1
    assert {name.removesuffix(".o") for name in everything} - {library} <= units
    assert build.build_for_wheel(wheel) == wheel / library
    assert compiled() == [library], "linked again, not compiled"
    assert [path.name for path in wheel.iterdir()] == [library]
    monkeypatch.setenv("COMPILER_VERSION", "13")
    build.build_for_wheel(wheel)
    assert compiled() == everything
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    build.build_for_wheel(wheel)
    assert compiled() == everything, "without a cache"


def test_a_file_that_is_no_library_is_an_os_error(tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"lib\.so"):
        cpu.Library(path)


def test_a_cached_file_that_does_not_load_falls_back_to_the_reference(monkeypatch, tmp_path):
    path = tmp_path / "lib.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(build, "find", lambda: path)
    cpu.load.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"torch reference.*lib\.so"):
            assert cpu.load() is None
    finally:
        cpu.load.cache_clear()

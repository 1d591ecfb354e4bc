"""References: what is taken, what it means, and that nothing else gets through."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pgz.core.digest import Digest
from p2pgz.core.reference import Reference, parse_reference
from p2pgz.errors import UsageError

HEX = "ab" * 32
AT = f"@sha256:{HEX}"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ubuntu", "docker.io/library/ubuntu:latest"),
        ("ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
        ("team/app", "docker.io/team/app:latest"),
        ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
        ("index.docker.io/team/app", "docker.io/team/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1"),
        ("Registry.Example/a/b/c__d:x", "registry.example/a/b/c__d:x"),
        ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        (f"ubuntu{AT}", f"docker.io/library/ubuntu{AT}"),
        (f"ubuntu:24.04{AT}", f"docker.io/library/ubuntu:24.04{AT}"),
        ("oci:/srv/image", "oci:/srv/image"),
        ("oci:/srv/image:v1", "oci:/srv/image:v1"),
        ("oci:/srv/a:b/image", "oci:/srv/a:b/image"),
        (f"oci:dir{AT}", f"oci:dir{AT}"),
        ("oci:/home/me@host/dir", "oci:/home/me@host/dir"),
        ("oci-archive:image.tar:v1", "oci-archive:image.tar:v1"),
    ],
)
def test_reference_has_its_canonical_form(text, canonical):
    reference = parse_reference(text)
    assert str(reference) == canonical
    assert parse_reference(canonical) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":x",
        "x:",
        "/x",
        "x/",
        "../x",
        "x/../y",
        "a..b",
        "-a",
        "Ubuntu",
        "TEAM/app",
        "http://registry.example/x",
        "registry.example/x?y=1",
        "registry.example/x#y",
        "user:password@registry.example/x",
        "registry.example:0/x",
        "registry.example:99999/x",
        "registry.example//x",
        "registry.example/",
        "x\n",
        "x\0",
        "x y",
        "ü",
        "x@md5:00",
        "x@sha256:AB",
        AT,
        HEX,
        "a" * 300,
        "x:" + "t" * 129,
        "oci:",
        "oci::tag",
        "oci:dir:",
        "oci:dir:-t",
        "oci:dir\n:t",
        "oci-archive:",
    ],
)
def test_bad_reference_is_refused_with_a_hint(text):
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_fields_of_a_registry_reference():
    assert parse_reference(f"localhost:5000/a/b:t{AT}") == Reference(
        transport="registry",
        host="localhost:5000",
        repository="a/b",
        tag="t",
        digest=Digest(bytes.fromhex(HEX)),
    )


def test_tag_can_be_changed_and_leads_to_the_external_toc():
    reference = parse_reference(f"ubuntu:24.04{AT}")
    assert reference.external_toc_tag == "24.04-esgztoc"
    assert str(reference.with_tag("x")) == "docker.io/library/ubuntu:x"
    assert parse_reference(f"ubuntu{AT}").external_toc_tag == ""
    with pytest.raises(UsageError):
        reference.with_tag("../x")


SAFE_HOST = re.compile(r"[a-z0-9.\-]+(:\d+)?|\[[0-9a-f:]+\](:\d+)?")
SAFE_REPOSITORY = re.compile(r"[a-z0-9._\-/]+")


@given(
    st.one_of(
        st.text(max_size=60), st.text("aZ0.-_/:@[]?#%\\ \n\0é", max_size=40), st.text(":/.@ab", max_size=30)
    )
)
@example("oci:a:b:c")
@example("localhost:5000")
@settings(max_examples=300)
def test_any_text_parses_to_something_safe_or_raises_usage_error(text):
    try:
        reference = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(str(reference)) == reference
    if reference.transport == "registry":
        assert SAFE_HOST.fullmatch(reference.host)
        assert SAFE_REPOSITORY.fullmatch(reference.repository)
        assert not {"", ".", ".."} & set(reference.repository.split("/"))
        assert reference.tag or reference.digest
    else:
        assert reference.path
        assert "\0" not in reference.path
    assert re.fullmatch(r"[A-Za-z0-9_.-]*", reference.tag)
    assert not reference.tag.startswith((".", "-"))

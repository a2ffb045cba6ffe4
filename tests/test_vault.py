"""Sealed secrets open only where they belong, and keys are never lost."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import random
import re
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from hypothesis import given, settings
from hypothesis import strategies as st
from rights import ROOT, without_root_rights
from service import Service, fresh_processes, prepared_keys, write_inventory

import healthchecker
from healthchecker import SecretError, Vault, open_vault

SECRET = "S3cret-ü-😀"
ROW = ("password", "db1", "db1.example.com", "monitor", "22")
POSIX_ONLY = pytest.mark.skipif(sys.platform == "win32", reason="Windows has access lists and no file modes")


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    """A vault with keys, for tests that do not change them."""
    return Vault(prepared_keys(tmp_path_factory.mktemp("vault")))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Vault:
    """A vault with other keys."""
    vault = Vault(tmp_path_factory.mktemp("foreign") / "keys")
    vault.create()
    return vault


# --- tokens --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("secret", ["", "p", SECRET, "HC2.a.b.c.d", "x" * 1024, "line\nline\r\n\t\0"])
def test_round_trip(secret: str, vault: Vault) -> None:
    token = vault.seal(secret, *ROW)
    assert vault.open(token, *ROW) == secret
    assert re.fullmatch(r"HC2\.[0-9a-f]{16}(\.[A-Za-z0-9_-]+){3}", token)
    assert len(secret) < 6 or secret not in token


def test_every_token_is_fresh(vault: Vault) -> None:
    """The same secret twice has no part in common but the key id."""
    first, second = (vault.seal(SECRET, *ROW).split(".") for _ in range(2))
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])


def test_token_is_what_it_says(vault: Vault) -> None:
    """AES-256-GCM, 12-byte nonce, 16-byte tag, its key under RSA-OAEP of 3072 bits: measured from the token itself."""
    _, key_id, wrapped, nonce, ciphertext = vault.seal(SECRET, *ROW).split(".")
    raw = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in (wrapped, nonce, ciphertext)]
    assert (len(raw[0]) * 8, len(raw[1]), len(raw[2])) == (3072, 12, len(SECRET.encode()) + 16)
    private = serialization.load_pem_private_key((vault.folder / "private.pem").read_bytes(), None)
    assert isinstance(private, rsa.RSAPrivateKey) and private.key_size == 3072
    assert key_id == vault.key_id
    key = private.decrypt(raw[0], healthchecker.OAEP)
    assert len(key) == 32
    with pytest.raises(InvalidTag):  # without what it is bound to, it does not open
        AESGCM(key).decrypt(raw[1], raw[2], None)


@pytest.mark.parametrize(
    "row",
    [
        ("key_passphrase", *ROW[1:]),
        (ROW[0], "db2", *ROW[2:]),
        (*ROW[:2], "db2.example.com", *ROW[3:]),
        (*ROW[:3], "root", "22"),
        (*ROW[:3], "", "22"),
        (*ROW[:4], "23"),
        (*ROW[:4], ""),
        ROW[:4],
        (*ROW, ""),
        ("password", "db1db1", ".example.com", "monitor", "22"),
        ("password", "db1", "db1.example.commonitor", "", "22"),
        ("password", "db1", "db1.example.com", "monitor2", "2"),
        ("", "passworddb1", *ROW[2:]),
        (),
    ],
)
def test_moved_token_does_not_open(row: tuple[str, ...], vault: Vault) -> None:
    with pytest.raises(SecretError, match="belongs to another name, hostname, port or username"):
        vault.open(vault.seal(SECRET, *ROW), *row)


RECORDED = Path(__file__).parent / "recorded" / "schema2"  # of a version that bound no port


def test_token_of_the_version_before(tmp_path: Path) -> None:
    """It opens for its row on any port, and nowhere else; it cannot be passed off as one that is bound to a port."""
    (tmp_path / "keys").mkdir(mode=0o700)
    shutil.copy(RECORDED / "private.pem", tmp_path / "keys")
    (tmp_path / "keys" / "private.pem").chmod(0o600)
    old = Vault(tmp_path / "keys")
    [token] = re.findall(r"HC1\.[\w.-]+", (RECORDED / "inventory.yaml").read_text(encoding="utf-8"))
    row = ("password", "sealed", "sealed.example.com", "monitor", "22")
    assert old.open(token, *row) == old.open(token, *row[:4], "23") == "of the file"
    for number, part in enumerate(row[:4]):
        with pytest.raises(SecretError, match="belongs to another"):
            old.open(token, *row[:number], part + "x", *row[number + 1 :])
    for moved in (row, row[:4]):
        with pytest.raises(SecretError, match="belongs to another"):
            old.open(token.replace("HC1.", "HC2."), *moved)
    with pytest.raises(SecretError, match="belongs to another"):
        old.open(old.seal("new", *row).replace("HC2.", "HC1."), *row)


def test_ciphertexts_of_two_rows_cannot_be_mixed(vault: Vault) -> None:
    other = ("password", "db2", "db2.example.com", "monitor", "22")
    mine, theirs = vault.seal(SECRET, *ROW).split("."), vault.seal("theirs", *other).split(".")
    for mask in range(1, 8):
        token = ".".join(mine[:2] + [(theirs if mask >> n & 1 else mine)[n + 2] for n in range(3)])
        for row in (ROW, other)[: 1 if mask == 7 else 2]:
            with pytest.raises(SecretError):
                vault.open(token, *row)


@settings(derandomize=True, database=None)
@given(place=st.integers(0, 10_000), cut=st.integers(0, 3), insert=st.text("AZaz09-_.=+/ \n\0ü\ud800", max_size=3))
def test_mutated_token_does_not_open(place: int, cut: int, insert: str, vault: Vault) -> None:
    """Whatever is changed in a token: SecretError, and nothing of it in the text."""
    token = TOKENS.setdefault(id(vault), vault.seal(SECRET, *ROW))
    place %= len(token) + 1
    changed = token[:place] + insert + token[place + cut :]
    try:
        opened = vault.open(changed, *ROW)
    except SecretError as error:
        assert SECRET not in str(error) and token.split(".")[2] not in str(error)
    else:
        assert changed == token and opened == SECRET


TOKENS: dict[int, str] = {}


@pytest.mark.parametrize(
    "token", ["", "HC2", "HC2....", "HC3.a.b.c.d", "HC2.a.b.c", "HC1.a.b.c.d", "HC2.a.b.c.d.e", "....", "HC2.ü.b.c.d"]
)
def test_malformed_token(token: str, vault: Vault) -> None:
    with pytest.raises(SecretError):
        vault.open(token, *ROW)


def test_password_that_looks_sealed_is_not_quoted(vault: Vault) -> None:
    """A plain password may begin with HC2 and hold dots; the text must not show a part of it as a key's id."""
    with pytest.raises(SecretError) as caught:
        vault.open("HC2.hunter2.b.c.d", *ROW)
    assert "hunter2" not in str(caught.value)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    first=st.lists(st.text(max_size=4), min_size=1, max_size=4),
    second=st.lists(st.text(max_size=4), min_size=1, max_size=4),
)
def test_rows_are_told_apart(first: list[str], second: list[str]) -> None:
    assert (healthchecker.length_prefixed(*first) == healthchecker.length_prefixed(*second)) == (first == second)


# --- the key's id and file -----------------------------------------------------------------------------------
def public_id(folder: Path) -> str:
    """The id of the key in public.pem, reckoned here once more."""
    public = serialization.load_pem_public_key((folder / "public.pem").read_bytes())
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()[:16]


def test_first_start_makes_a_pair(tmp_path: Path) -> None:
    vault = open_vault(tmp_path / "new" / "keys", [])
    assert sorted(path.name for path in vault.folder.iterdir()) == ["private.pem", "public.pem"]
    assert vault.key_id == public_id(vault.folder)
    assert Vault(vault.folder).open(vault.seal(SECRET, *ROW), *ROW) == SECRET


@POSIX_ONLY
def test_modes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = open_vault(tmp_path / "keys", []).folder
    finally:
        os.umask(before)
    assert (folder.stat().st_mode & 0o777, (folder / "private.pem").stat().st_mode & 0o777) == (0o700, 0o600)


# The grammar of [MS-DTYP] 2.5.1.1. A file below C: has there what the folder gives: administrators, SYSTEM, users, and
# who is logged in; one of a folder that was given to an account by icacls has that account's, too.
ACCESS_LISTS = {
    "D:AI(A;ID;FA;;;BA)(A;ID;FA;;;SY)(A;ID;0x1200a9;;;BU)(A;ID;0x1301bf;;;AU)": "",
    "D:AI(A;ID;0x1301bf;;;LS)(A;ID;FA;;;BA)(A;ID;FA;;;S-1-5-21-1-2-3-1104)(A;ID;0x1200a9;;;WD)": (
        "(A;;0x1301bf;;;LS)(A;;FA;;;S-1-5-21-1-2-3-1104)"
    ),
    "D:AI(D;;FW;;;BU)(A;;FA;;;WD)(A;ID;FR;;;LS)(D;ID;FA;;;BG)": "(D;;FW;;;BU)(D;;FA;;;BG)(A;;FR;;;LS)",
    'D:(A;;FA;;;S-1-5-80-1)(XA;;FX;;;S-1-1-0;(@User.Title=="PM"))(A;;FA;;;AN)': "(A;;FA;;;S-1-5-80-1)",
    "D:P(A;;FR;;;OW)(A;;FA;;;SY)(A;;FR;;;BA)": "",
    "D:NO_ACCESS_CONTROL": "",
    "": "",
}


@pytest.mark.parametrize("access", ACCESS_LISTS)
def test_who_keeps_access_on_windows(access: str) -> None:
    """Denials first, then whom the folder was given for, then the owner, SYSTEM and the administrators; P: no more."""
    kept = ACCESS_LISTS[access]
    assert healthchecker.restricted(access) == f"D:P{kept}(A;;FA;;;S-1-3-4)(A;;FA;;;SY)(A;;FA;;;BA)"


@pytest.mark.parametrize(("access", "is_open"), [
    ("D:AI(A;ID;0x1301bf;;;AU)(A;ID;FA;;;SY)(A;ID;FA;;;BA)(A;ID;0x1200a9;;;BU)", True),   # below C:
    ("D:AI(A;ID;0x1301bf;;;LS)(A;ID;FA;;;SY)(A;ID;FA;;;BA)", False),     # below a folder as the README makes it
    ("D:(A;;FR;;;WD)(A;;FX;;;BU)(A;;GR;;;AU)(D;;FA;;;BG)", False), ("D:(A;;SDGXGWGR;;;AU)", True), ("D:", False),
    ("D:(A;;0x1200ad;;;WD)", True), ("D:(A;;CCLCRC;;;BU)", True), ("D:NO_ACCESS_CONTROL", True),
])  # fmt: skip
def test_whether_everybody_changes_a_file_on_windows(access: str, is_open: bool) -> None:
    assert healthchecker.open_to_changes(access) is is_open


def test_the_old_owner_keeps_access_on_windows() -> None:
    """What `keys rotate` replaces is an administrator's from then on, to whom OWNER RIGHTS (OW, S-1-3-4) go then."""
    service = "S-1-5-21-1-2-3-1104"
    entries = "(A;;FR;;;LS)(A;;FA;;;S-1-3-4)(A;;FA;;;SY)"
    assert healthchecker.still_of(service, f"D:P{entries}") == f"D:P{entries}(A;;FA;;;{service})"
    assert healthchecker.still_of("LS", "D:P(D;;FW;;;OW)(A;OI;FR;;;OW)") == "D:P(D;;FW;;;OW)(A;OI;FR;;;OW)(A;;FR;;;LS)"
    for access in ("D:AI(A;ID;FA;;;BA)", "D:NO_ACCESS_CONTROL", "D:P"):
        assert healthchecker.still_of(service, access) == access


def test_a_file_that_is_replaced_is_there_at_any_moment(tmp_path: Path) -> None:
    """A kill between two steps of it would leave no inventory."""
    path, missing, done = tmp_path / "inventory.yaml", list[str](), threading.Event()
    path.write_bytes(b"old")

    def look() -> None:
        while not done.wait(0.0002):
            try:
                path.stat()
            except FileNotFoundError as error:
                missing.append(str(error))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for number in range(300):
            new = tmp_path / "new"
            new.write_bytes(b"%d" % number)
            healthchecker.take_place(new, path)
            assert path.read_bytes() == b"%d" % number
            assert not new.exists()
    finally:
        done.set()
        looking.join()
    assert not missing


if sys.platform == "win32":

    def access_list(path: Path) -> str:
        """As Windows has it now."""
        return healthchecker.access_of(path)[1]

    def test_what_takes_a_place_has_its_access_list(tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        healthchecker.create_private(old)
        healthchecker.let_read(old)
        new.write_bytes(b"new")
        kept = access_list(old)
        assert access_list(new) != kept
        healthchecker.take_place(new, old)
        assert (access_list(old), old.read_bytes()) == (kept, b"new")
        new.write_bytes(b"newer")
        with pytest.raises(FileNotFoundError):
            healthchecker.take_place(new, tmp_path / "none")
        assert new.exists()

    def test_what_others_have_open_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a scanner of viruses does for a moment with what was just written."""
        old, new = tmp_path / "old", tmp_path / "new"
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        with old.open("rb"), pytest.raises(PermissionError):
            monkeypatch.setattr(healthchecker, "OPEN_ELSEWHERE", 0.1)
            healthchecker.take_place(new, old)
        assert (old.read_bytes(), new.read_bytes()) == (b"old", b"new")
        monkeypatch.undo()
        scanner = old.open("rb")
        threading.Timer(0.3, scanner.close).start()
        healthchecker.take_place(new, old)
        assert (old.read_bytes(), new.exists()) == (b"new", False)

    def test_access_lists(tmp_path: Path) -> None:
        """What everybody has of the folder is gone from a file that is made. (Wine keeps no entry of BU or S-1-3-4.)"""
        plain, private, shared = (tmp_path / name for name in ("plain", "ü 😀", "shared"))
        plain.write_bytes(b"")
        for path in (private, shared):
            healthchecker.create_private(path, b"x")
            assert path.read_bytes() == b"x"
        healthchecker.let_read(shared)
        assert "(A;;0x1200a9;;;WD)" in access_list(plain)
        assert "WD" not in access_list(private) and "(A;;FA;;;SY)" in access_list(private)
        assert access_list(shared).startswith(access_list(private))
        with pytest.raises(FileNotFoundError):
            healthchecker.restrict(tmp_path / "none")


@POSIX_ONLY
def test_readable_key_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = prepared_keys(tmp_path)
    (folder / "private.pem").chmod(0o644)
    Vault(folder)
    assert "chmod 600" in caplog.text


def test_an_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    folder = prepared_keys(tmp_path)
    before = (folder / "private.pem").read_bytes()
    with pytest.raises(SecretError):
        Vault(folder).create()
    assert (folder / "private.pem").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["private.pem", "public.pem"]


@POSIX_ONLY
def test_a_private_key_alone_where_nothing_can_be_written(tmp_path: Path) -> None:
    """As a Secret of Kubernetes is: a start needs no more, nor does `check` say that it would."""
    folder = prepared_keys(tmp_path)
    (folder / PUBLIC).unlink()
    folder.chmod(0o500)
    try:
        with without_root_rights():
            vault = open_vault(folder, [])
    finally:
        folder.chmod(0o700)
    assert vault.open(vault.seal(SECRET, *ROW), *ROW) == SECRET and not (folder / PUBLIC).exists()


def test_two_first_starts_at_once_agree(tmp_path: Path) -> None:
    """One makes the keys; the other says so or uses them, and never has keys of its own."""
    vaults: list[Vault] = []

    def begin() -> None:
        with contextlib.suppress(SecretError):
            vaults.append(open_vault(tmp_path / "keys", []))

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert vaults and {vault.key_id for vault in vaults} == {Vault(tmp_path / "keys").key_id}


PUBLIC, PRIVATE, NEXT = "public.pem", "private.pem", "next.pem"


def remains(*names: str) -> Callable[[Path], None]:
    def strip(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return strip


@pytest.mark.parametrize(
    ("make", "same_key"),
    [
        (remains(PRIVATE), True),
        (remains(PUBLIC), False),
        (remains(), False),
        (lambda folder: (folder / ".private.pem.0a1b2c3d").write_bytes(b"half"), True),
        (lambda folder: (folder / PUBLIC).write_bytes(b""), True),
        (lambda folder: (folder / PUBLIC).write_bytes(b"-----BEGIN PUBLIC KEY-----\nMIIB"), True),
    ],
    ids=[
        "no public key",
        "no private key",
        "empty folder",
        "left-over of a crash",
        "empty public key",
        "half a public key",
    ],
)
def test_half_written_folder(make: Callable[[Path], None], same_key: bool, tmp_path: Path) -> None:
    """With nothing sealed, a start makes the folder whole; public.pem is the key that seals."""
    folder = prepared_keys(tmp_path)
    before = Vault(folder).key_id
    make(folder)
    vault = open_vault(folder, [])
    assert (vault.key_id == before) is same_key
    assert public_id(folder) == vault.key_id


# --- damaged and foreign keys --------------------------------------------------------------------------------
def pem(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, password: bytes = b""
) -> bytes:
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)


def armoured(der: bytes) -> bytes:
    return b"-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(der) + b"-----END PRIVATE KEY-----\n"


def unknown_algorithm(_: bytes) -> bytes:
    der = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return armoured(der.replace(b"\x06\x03\x2b\x65\x70", b"\x06\x03\x2b\x65\x7a"))


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"no key\n",
    "binary": lambda _: bytes(range(256)),
    "first half": lambda good: good[: len(good) // 2],
    "without its last line": lambda good: b"\n".join(good.splitlines()[:-1]),
    "a line lost": lambda good: b"\n".join(line for n, line in enumerate(good.splitlines()) if n != 7),
    "one letter": lambda good: good[:700] + bytes([good[700] ^ 1]) + good[701:],
    "EC": lambda _: pem(ec.generate_private_key(ec.SECP256R1())),
    "Ed25519": lambda _: pem(ed25519.Ed25519PrivateKey.generate()),
    "with a passphrase": lambda good: pem(serialization.load_pem_private_key(good, None), b"x"),  # type: ignore[arg-type]
    "unknown algorithm": unknown_algorithm,
    "certificate": lambda _: b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_private_key(case: str, tmp_path: Path) -> None:
    """SecretError that names the file, and the file stays as it was."""
    folder = prepared_keys(tmp_path)
    path = folder / PRIVATE
    path.write_bytes(DAMAGED[case](path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(SecretError, match=r"private\.pem") as caught:
        open_vault(folder, [])
    assert path.read_bytes() == before
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize("changed", ["p", "q", "d", "dmp1", "dmq1", "iqmp", "e", "n", "p n"])
def test_a_private_key_whose_numbers_do_not_belong_together(changed: str, tmp_path: Path) -> None:
    """What it sealed would not open."""
    folder = prepared_keys(tmp_path)
    key: Any = serialization.load_pem_private_key((folder / PRIVATE).read_bytes(), None)
    numbers, kind = key.private_numbers(), serialization.Encoding.DER
    der = key.private_bytes(kind, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    others = {name: getattr(numbers, name) + 2 for name in ("p", "q", "d", "dmp1", "dmq1", "iqmp")}
    others |= {"e": 65539, "n": others["p"] * numbers.q if changed == "p n" else numbers.public_numbers.n + 2}
    for name in changed.split():
        old = getattr(numbers.public_numbers if name in "en" else numbers, name)
        was, now = (number.to_bytes((old.bit_length() + 7) // 8, "big") for number in (old, others[name]))
        assert der.count(was) == 1
        der = der.replace(was, now)
    (folder / PRIVATE).write_bytes(armoured(der))
    with pytest.raises(SecretError, match=r"private\.pem .*; put the right one back"):
        open_vault(folder, [])


@pytest.mark.skipif(not ROOT or sys.platform != "linux", reason="gives a file away, and drops rights as Linux has them")
@pytest.mark.parametrize(("owner", "remedy"), [
    (65534, "run as nobody, or give it to root"), (54321, "run as 54321, or give it to root"), (0, "run: chmod u+r ")])
def test_a_private_key_that_this_account_may_not_read(owner: int, remedy: str, tmp_path: Path) -> None:
    """It is sound: nobody must look for another one."""
    path = prepared_keys(tmp_path) / "private.pem"
    path.chmod(0o200)
    os.chown(path, owner, owner)
    with without_root_rights(), pytest.raises(SecretError) as refused:
        Vault(tmp_path / "keys")
    assert str(refused.value).startswith(f"{path}: this account (root) may not read it; {remedy}")


def test_private_key_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "keys" / PRIVATE).mkdir(parents=True)
    with pytest.raises(SecretError, match=r"private\.pem"):
        open_vault(tmp_path / "keys", [])


def test_keys_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"")
    with pytest.raises(SecretError):
        open_vault(tmp_path / "keys", [])


def test_public_key_alone_is_no_private_key(tmp_path: Path) -> None:
    folder = prepared_keys(tmp_path)
    shutil.copy(folder / PUBLIC, folder / PRIVATE)
    with pytest.raises(SecretError, match=r"private\.pem"):
        open_vault(folder, [])


@pytest.mark.parametrize("here", ["none", "foreign"])
def test_missing_key_is_named_and_none_is_made(here: str, vault: Vault, foreign: Vault, tmp_path: Path) -> None:
    token = vault.seal(SECRET, *ROW)
    folder = tmp_path / "keys"
    if here == "foreign":
        shutil.copytree(foreign.folder, folder)
    with pytest.raises(SecretError, match=vault.key_id) as caught:
        open_vault(folder, [token])
    assert (foreign.key_id in str(caught.value)) is (here == "foreign")
    assert not folder.exists() if here == "none" else Vault(folder).key_id == foreign.key_id


def test_a_secret_of_another_key_costs_its_resource_alone(vault: Vault, foreign: Vault) -> None:
    tokens = [vault.seal(SECRET, *ROW), foreign.seal(SECRET, *ROW)]
    assert open_vault(vault.folder, tokens).open(tokens[0], *ROW) == SECRET


# --- keys rotate ---------------------------------------------------------------------------------------------
HOSTS = 6


def installation(folder: Path) -> Path:
    """An inventory of sealed and plain passwords, imported into a database."""
    keys = prepared_keys(folder)
    vault = Vault(keys)
    lines = []
    for number in range(HOSTS):
        name = f"h{number}.example.com"
        secret = f"secret {number}"
        sealed = vault.seal(secret, "password", name, name, "u", "22") if number % 2 else secret
        lines.append(f"  - {{hostname: {name}, username: u, password: {sealed}}}  # {number}\n")
    path = write_inventory(folder, "".join(lines))
    setup = healthchecker.Installation(path)
    with closing(healthchecker.Store(setup.database)) as store, store.writing() as session:
        healthchecker.import_inventory(session, setup.inventory, vault)
    return path


def stored(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path.parent / "healthchecker.db")) as connection:
        return dict(connection.execute("SELECT name, password FROM resource ORDER BY name"))


def all_open(path: Path) -> set[str]:
    """Opens every secret of file and database with the keys that are there; gives the key ids in use."""
    setup = healthchecker.Installation(path)
    vault = Vault(path.parent / "keys")
    tokens = stored(path)
    assert len(tokens) == HOSTS
    for resource in setup.inventory.resources:
        name, secret = resource.name, resource.secrets["password"]
        row = ("password", name, name, "u", "22")
        if secret.startswith("HC2."):
            tokens[f"{name} in the file"] = secret
        for token in (tokens[name], tokens.get(f"{name} in the file", tokens[name])):
            assert vault.open(token, *row) == f"secret {name[1:].partition('.')[0]}"
    return {token.split(".")[1] for token in tokens.values()}


def rotate(path: str) -> None:
    """For a process of its own."""
    with open(os.devnull, "w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)
    sys.exit(healthchecker.main(["--inventory", path, "keys", "rotate"]))


def test_rotate(tmp_path: Path) -> None:
    path = installation(tmp_path)
    folder = tmp_path / "keys"
    old, text = Vault(folder).key_id, path.read_text(encoding="utf-8")
    old_private = (folder / PRIVATE).read_bytes()
    assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 0
    new = public_id(folder)
    assert all_open(path) == {new} != {old}
    assert sorted(item.name for item in folder.iterdir()) == [PRIVATE, PUBLIC]
    assert (folder / PRIVATE).read_bytes() != old_private
    strip = re.compile(r"HC2\.[\w.-]+")
    assert strip.sub("", path.read_text(encoding="utf-8")) == strip.sub("", text)


def test_rotate_killed_at_any_moment(tmp_path: Path) -> None:
    """After each kill everything opens with the keys in the folder; in the end it runs through and one key is left."""
    path = installation(tmp_path)
    folder = tmp_path / "keys"
    moments = random.Random(20240229)
    unfinished = 0
    for _ in range(3 if sys.platform == "win32" else 6):
        process = fresh_processes().Process(target=rotate, args=(str(path),))
        before = (folder / PRIVATE).read_bytes()
        process.start()
        begin, seen = time.monotonic(), False
        while not seen and process.is_alive() and time.monotonic() < begin + 20:
            seen = (folder / NEXT).exists()
            process.join(0.001)
        process.join(moments.uniform(0, 0.12))
        process.kill()
        process.join(60)
        unfinished += (folder / PRIVATE).read_bytes() == before
        process.close()
        all_open(path)
    assert unfinished
    assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 0
    assert all_open(path) == {public_id(folder)}
    assert not (folder / NEXT).exists()


STAGES = ["next key made", "rows resealed", "file resealed", "old key replaced"]


@pytest.fixture(scope="module")
def rotation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An installation before and after `keys rotate`."""
    before = tmp_path_factory.mktemp("before")
    after = tmp_path_factory.mktemp("after") / "copy"
    path = installation(before)
    shutil.copytree(before, after)
    assert healthchecker.main(["--inventory", str(after / path.name), "keys", "rotate"]) == 0
    return before, after


def interrupted(stage: int, before: Path, after: Path, folder: Path) -> Path:
    """The inventory in a `folder` that a rotation has left at a stage."""
    shutil.copytree(before, folder)
    path = folder / "inventory.yaml"
    shutil.copy(after / "keys" / PRIVATE, folder / "keys" / NEXT)
    if stage >= 1:
        for leftover in folder.glob("healthchecker.db*"):
            leftover.unlink()
        shutil.copy(after / "healthchecker.db", folder)
    if stage >= 2:
        shutil.copy(after / path.name, folder)
    if stage >= 3:
        (folder / "keys" / NEXT).replace(folder / "keys" / PRIVATE)
    return path


@pytest.mark.parametrize("stage", range(len(STAGES)), ids=STAGES)
def test_rotate_interrupted_between_its_steps(stage: int, rotation: tuple[Path, Path], tmp_path: Path) -> None:
    """Each state a crash can leave, put together from before and after: a start works, so does a rotation."""
    before, after = tmp_path / "before", rotation[1]
    path = interrupted(stage, rotation[0], after, before)
    setup = healthchecker.Installation(path)
    with closing(healthchecker.Store(setup.database)) as store, store.writing() as session:
        vault = setup.open_vault(session)
        changes = healthchecker.import_inventory(session, setup.inventory, vault)
    assert (len(changes.kept), changes.changed) == (HOSTS, [])
    if stage < 3:
        assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 0
    assert all_open(path) == {public_id(before / "keys")}
    assert sorted(item.name for item in (before / "keys").iterdir()) == [PRIVATE, PUBLIC]


@pytest.mark.parametrize("stage", range(3), ids=STAGES[:3])
def test_rotate_after_the_old_key_is_lost(
    stage: int, rotation: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a rotation: it ends where all is sealed with the new key, else it says what is lost."""
    before, after = tmp_path / "before", rotation[1]
    path = interrupted(stage, rotation[0], after, before)
    (before / "keys" / PRIVATE).unlink()
    code = healthchecker.main(["--inventory", str(path), "keys", "rotate"])
    if stage < 2:
        [line] = capsys.readouterr().err.splitlines()
        assert code == 3 and "put private.pem back, or if it is lost, write every secret in the inventory" in line
        return
    assert code == 0
    assert all_open(path) == {public_id(before / "keys")}
    assert sorted(item.name for item in (before / "keys").iterdir()) == [PRIVATE, PUBLIC]


def rotate_until_the_old_key_goes(path: str) -> None:
    """For a process of its own, which ends where a loss of power hurts most."""
    sys.addaudithook(lambda name, given: os._exit(9) if name == "os.rename" and "next.pem" in str(given[0]) else None)
    rotate(path)


def test_rotated_rows_are_on_the_disk_before_the_old_key_goes(tmp_path: Path) -> None:
    """Their commit waited for it, as every one does but some of polls."""
    path = installation(tmp_path)
    process = fresh_processes().Process(target=rotate_until_the_old_key_goes, args=(str(path),))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert {token.split(".")[1] for token in stored(path).values()} == {Vault(tmp_path / "keys").key_id}


def test_rotate_keeps_what_is_known(tmp_path: Path) -> None:
    """A start after it goes on with the states of before."""
    path = installation(tmp_path)
    setup = healthchecker.Installation(path)
    digests = []
    for turn in range(2):
        with closing(healthchecker.Store(setup.database)) as store, store.writing() as session:
            row = session.scalars(sqlalchemy.select(healthchecker.Resource)).first()
            assert row
            digests.append(row.settings_digest)
            if turn == 0:
                session.add(healthchecker.Status(
                    resource_id=row.id, settings_digest=row.settings_digest, state="healthy", cause="", reason="",
                    credential_digest=row.credential_digest, since_at=1, polled_at=1, good=1, bad=0, seconds=0,
                    sample="null"))  # fmt: skip
            else:
                status = session.get(healthchecker.Status, row.id)
                assert status and status.settings_digest == row.settings_digest != digests[0]
                assert status.credential_digest == row.credential_digest
        if turn == 0:
            assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 0


def test_rotate_names_what_does_not_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = installation(tmp_path)
    with closing(sqlite3.connect(tmp_path / "healthchecker.db")) as connection, connection:
        connection.execute("UPDATE resource SET hostname = 'moved' WHERE name = 'h2.example.com'")
    before = stored(path)
    assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 3
    assert capsys.readouterr().err.startswith("h2.example.com: a sealed secret belongs to another")
    assert stored(path) == before and (tmp_path / "keys" / PRIVATE).exists()


def test_rotate_refuses_beside_a_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = installation(tmp_path)
    before = {item.name: item.read_bytes() for item in (tmp_path / "keys").iterdir()}
    with healthchecker.SqliteFile(tmp_path / "healthchecker.db").lock():
        assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {item.name: item.read_bytes() for item in (tmp_path / "keys").iterdir()} == before
    assert len(all_open(path)) == 1


def test_rotate_takes_no_key_from_another_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two inventories with a database each, whose keys are in one folder, as they are where nobody says another one:
    whichever has started last, neither loses its passwords."""
    prepared_keys(tmp_path)
    rows = "  - {name: one, hostname: 127.0.0.1, port: 9, username: u, password: p, critical: false, platform: linux}\n"
    paths = [write_inventory(tmp_path, rows, f"  database: sqlite:///{name}.db\n", f"{name}.yaml") for name in "ab"]
    for path in paths:
        with Service(path):
            pass
    old = (tmp_path / "keys" / PRIVATE).read_bytes()
    for path, other in zip(paths, "ba", strict=True):
        assert healthchecker.main(["--inventory", str(path), "keys", "rotate"]) == 2
        assert f"keys holds the key of {tmp_path / other}.db, too" in capsys.readouterr().err
    assert (tmp_path / "keys" / PRIVATE).read_bytes() == old
    started = tmp_path / "keys" / "started"
    gone = tmp_path / "before" / "a.db"     # the folder was moved: there is no such database any more
    started.write_text(f"{gone}\0{tmp_path / 'a.db'}", encoding="utf-8")
    assert healthchecker.main(["--inventory", str(paths[0]), "keys", "rotate"]) == 0
    started.unlink()
    with Service(paths[0]):
        pass
    assert healthchecker.main(["--inventory", str(paths[0]), "keys", "rotate"]) == 0


# what runs first, what comes in between at which step of it, and the exit codes of both
RACES: dict[str, tuple[list[str], list[str], type, str, tuple[int, int]]] = {
    "reload": (["reload"], ["keys", "rotate"], healthchecker.Store, "writing", (0, 0)),
    "seal": (["seal"], ["keys", "rotate"], Vault, "seal", (0, 4)),
    "keys rotate": (["keys", "rotate"], ["seal"], healthchecker.Store, "writing", (2, 0)),
}


@pytest.mark.parametrize("case", RACES)
def test_nothing_is_sealed_with_a_key_that_is_gone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a rotation and of what else seals, one waits, begins anew, or says that it was too late and then does it."""
    first, second, owner, step, expected = RACES[case]
    path = installation(tmp_path)
    hosts = [f"  - {{hostname: h{n}.example.com, username: u, password: secret {n}}}\n" for n in range(HOSTS)]
    write_inventory(tmp_path, "".join(hosts))
    genuine, codes = getattr(owner, step), []

    def between(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, step, genuine)
        codes.append(healthchecker.main(["--inventory", str(path), *second]))
        return genuine(*arguments, **options)

    monkeypatch.setattr(healthchecker, "BUSY_TIMEOUT", 0.1)
    monkeypatch.setattr(owner, step, between)
    codes.insert(0, healthchecker.main(["--inventory", str(path), *first]))
    assert all_open(path) == {public_id(tmp_path / "keys")}
    faults = [line for line in capsys.readouterr().err.splitlines() if "the service does not run" not in line]
    assert tuple(codes) == expected and len(faults) == sum(map(bool, codes))
    assert healthchecker.main(["--inventory", str(path), *(first if codes[0] else second)]) == 0
    assert all_open(path) == {public_id(tmp_path / "keys")}


@pytest.mark.parametrize("command", [["seal"], ["keys", "rotate"]], ids=" ".join)
def test_a_file_that_is_edited_once_it_was_read(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its secrets is that of its own resource, not of what stood in its place."""
    path = installation(tmp_path)
    host = "  - {{hostname: {0}.example.com, username: u, password: {1}}}\n"
    vault, rows = Vault(tmp_path / "keys"), dict[str, str]()
    for name in "cab":
        bound = "password", f"{name}.example.com", f"{name}.example.com", "u", "22"
        secret = f"secret {name}"
        rows[name] = host.format(name, secret if command == ["seal"] else vault.seal(secret, *bound))
    write_inventory(tmp_path, rows["a"] + rows["b"])
    genuine = healthchecker.load_inventory

    def edited(path: Path, **options: bool) -> Any:
        found = genuine(path, **options)
        write_inventory(tmp_path, "".join(rows.values()))
        return found

    monkeypatch.setattr(healthchecker, "load_inventory", edited)
    assert healthchecker.main(["--inventory", str(path), *command]) == 0
    for row in genuine(path).resources:
        token = row.secrets["password"]
        opened = Vault(tmp_path / "keys").open(token, "password", row.name, row.hostname, "u", "22")
        assert opened == f"secret {row.name[0]}"


# --- passwords of users --------------------------------------------------------------------------------------
def test_password_hash_is_the_published_function() -> None:
    """PBKDF2-HMAC-SHA512, reckoned with cryptography's own implementation."""
    salt = bytes(range(16))
    expected = PBKDF2HMAC(hashes.SHA512(), 64, salt, 220_000).derive(b"HealthChecker")
    assert healthchecker.hash_password("HealthChecker", salt) == expected

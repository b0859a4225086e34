"""A guest whose root is the attacker: packets of its own making, on its link and beyond, lead nowhere."""

from __future__ import annotations

from tests.network.conftest import World

REFUSED = "ConnectionRefusedError"

PACKETS = """
import os, socket, struct, time
GUEST, GATEWAY = bytes.fromhex('02534b000002'), bytes.fromhex('02534b000001')
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
link.bind(('eth0', 0))
link.settimeout(0.1)

def checksum(data):
    data += b'\\0' * (len(data) % 2)
    total = sum(struct.unpack(f'>{len(data) // 2}H', data))
    while total >> 16: total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

def ip(source, destination, protocol, payload, offset=0, more=False, number=1):
    head = struct.pack('>BBHHHBBH', 69, 0, 20 + len(payload), number, more << 13 | offset, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(destination)
    return head[:10] + struct.pack('>H', checksum(head)) + head[12:] + payload

def udp(port, data, source=4444):
    return struct.pack('>HHHH', source, port, 8 + len(data), 0) + data

def syn(source, destination, port):
    head = struct.pack('>HHIIBBHHH', 4445, port, 1, 0, 80, 2, 64000, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack('>BBH', 0, 6, len(head))
    return head[:16] + struct.pack('>H', checksum(pseudo + head)) + head[18:]

def send(packet, kind=0x0800, source=GUEST, destination=GATEWAY):
    link.send(destination + source + struct.pack('>H', kind) + packet)

def heard(seconds=1.5):
    '''What comes back: (protocol, source, payload) of IPv4.'''
    found, until = [], time.time() + seconds
    while time.time() < until:
        try: frame = link.recv(65536)
        except OSError: continue
        if frame[:6] == GUEST and frame[12:14] == b'\\x08\\0':
            found.append((frame[23], socket.inet_ntoa(frame[26:30]), frame[34:]))
    return found
"""


def test_a_raw_socket_reaches_what_any_other_does_and_no_more(world: World) -> None:
    world.policy("allowlist", ("203.0.113.7",))
    said = world.as_root(
        PACKETS
        + """
send(ip('198.18.0.2', '203.0.113.7', 17, udp(5000, b'through')))
print(any(protocol == 17 and b'through' in data for protocol, _, data in heard()))
handshake = syn('198.18.0.2', '93.184.216.99', 443)
for protocol, data in ((17, udp(5000, b'over')), (6, handshake), (132, b'sctp' * 9), (47, b'gre' * 9)):
    send(ip('198.18.0.2', '93.184.216.99', protocol, data))
answers = heard()
echoed = any(b'over' in data[36:] for protocol, _, data in answers if protocol == 17)
print(sorted({protocol for protocol, *_ in answers}), echoed)
"""
    )
    assert said.splitlines() == ["True", "[1, 6] False"]
    protocols = {each["destination"] for each in world.refusals() if "93.184.216.99" in each["destination"]}
    assert {"93.184.216.99 (132)", "93.184.216.99 (47)"} <= protocols


def test_a_forged_source_address_goes_nowhere(world: World) -> None:
    world.policy("full")
    said = world.as_root(
        PACKETS
        + """
others = ('198.18.0.1', '198.18.0.3', '198.18.1.2', '127.0.0.1', '10.200.0.1', '93.184.216.34')
for source in (*others, '255.255.255.255'):
    send(ip(source, '203.0.113.7', 17, udp(5000, b'forged')))
    send(ip(source, '203.0.113.7', 6, syn(source, '203.0.113.7', 443)))
print(heard())
"""
    )
    assert said.strip() == "[]"
    assert any(each["rule"] == "spoofed" for each in world.refusals())
    assert world.value("reach('203.0.113.7', 443)") == "203.0.113.7 443"


def test_a_forged_link_address_or_kind_of_frame_goes_nowhere(world: World) -> None:
    world.policy("full")
    said = world.as_root(
        PACKETS
        + """
packet = ip('198.18.0.2', '203.0.113.7', 17, udp(5000, b'forged'))
send(packet, source=bytes.fromhex('02534b000099'))
send(packet, source=GATEWAY)
send(struct.pack('>HH', 7, 0x0800) + packet, kind=0x8100)
send(struct.pack('>HH', 7, 0x0800) + packet, kind=0x88A8)
send(b'\\x11\\0\\0\\0\\0\\0' + packet, kind=0x8864)
print(heard())
"""
    )
    assert said.strip() == "[]"


def test_claims_by_arp_and_neighbour_discovery_change_nothing(world: World) -> None:
    world.policy("allowlist", ("203.0.113.7",))
    world.as_root(
        PACKETS
        + """
evil = bytes.fromhex('02534b0000ee')
for claimed in ('198.18.0.1', '198.18.0.2', '198.18.1.2', '10.200.0.2'):
    for code in (1, 2):
        arp = struct.pack('>HHBBH6s4s', 1, 0x0800, 6, 4, code, evil, socket.inet_aton(claimed))
        arp += GATEWAY + socket.inet_aton('198.18.0.1')
        send(arp, kind=0x0806)
        send(arp, kind=0x0806, destination=b'\\xff' * 6)
for claimed in ('fd53:4b::1', 'fd53:4b::2', 'fd00::2', 'fe80::1'):
    target = socket.inet_pton(socket.AF_INET6, claimed)
    body = struct.pack('>BBHI', 136, 0, 0, 0x60000000) + target + b'\\2\\1' + evil
    ends = socket.inet_pton(socket.AF_INET6, 'fd53:4b::2') + socket.inet_pton(socket.AF_INET6, 'fd53:4b::1')
    total = checksum(ends + struct.pack('>II', len(body), 58) + body)
    body = body[:2] + struct.pack('>H', total) + body[4:]
    send(struct.pack('>IHBB', 6 << 28, len(body), 58, 255) + ends + body, kind=0x86DD)
# A router's advertisement, and a redirect.
router = struct.pack('>BBHBBHII', 134, 0, 0, 64, 0, 1800, 0, 0)
send(struct.pack('>IHBB', 6 << 28, 16, 58, 255) + ends + router, kind=0x86DD)
"""
    )
    assert world.value("reach('203.0.113.7', 443)") == "203.0.113.7 443"
    assert world.value("reach('93.184.216.99', 443)") == REFUSED


def test_fragments_are_put_together_before_they_are_judged(world: World) -> None:
    world.policy("allowlist", ("203.0.113.7:5000",))
    said = world.as_root(
        PACKETS
        + """
whole = udp(5000, b'a' * 40)
send(ip('198.18.0.2', '203.0.113.7', 17, whole[:24], more=True, number=9))
send(ip('198.18.0.2', '203.0.113.7', 17, whole[24:], offset=3, number=9))
print(any(b'aaaa' in data for protocol, _, data in heard() if protocol == 17))
# A first fragment too small for the port, and one whose port a later one writes over.
whole = udp(443, b'tiny' * 10)
send(ip('198.18.0.2', '203.0.113.7', 17, whole[:8], more=True, number=10))
send(ip('198.18.0.2', '203.0.113.7', 17, whole[8:], offset=1, number=10))
send(ip('198.18.0.2', '203.0.113.7', 17, udp(5000, b'over' * 10)[:32], more=True, number=11))
send(ip('198.18.0.2', '203.0.113.7', 17, udp(443, b'over' * 10)[:32], more=True, number=11))
send(ip('198.18.0.2', '203.0.113.7', 17, udp(443, b'over' * 10)[32:], offset=4, number=11))
print({struct.unpack('>H', data[:2])[0] for protocol, _, data in heard() if protocol == 17} <= {5000})
"""
    )
    assert said.splitlines() == ["True", "True"]
    assert any(each["destination"] == "203.0.113.7:443 (udp)" for each in world.refusals())


def test_a_flood_of_refused_packets_costs_its_notes_and_neither_host_nor_kernel(world: World) -> None:
    world.policy("allowlist", ("203.0.113.7",))
    world.as_root(
        PACKETS
        + """
for number in range(20000):
    place = f'93.184.{number >> 8 & 255}.{number & 255}'
    try: send(ip('198.18.0.2', place, 17, udp(1 + number % 65535, b'x')))
    except OSError: pass
"""
    )
    assert world.value("reach('203.0.113.7', 443)") == "203.0.113.7 443"
    assert len(world.refusals()) < 5000


def test_no_policy_lets_a_guest_choose_its_own_addresses(world: World) -> None:
    world.policy("full")
    said = world.as_root(
        """
        import subprocess
        def sh(*words): subprocess.run(words, capture_output=True)
        import fcntl, socket, struct
        probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        address = struct.pack('=HH4s8x', 2, 0, socket.inet_aton('198.18.1.50'))
        fcntl.ioctl(probe, 0x8916, struct.pack('16s16s8x', b'eth0:1', address))
        try:
            forged = ('198.18.1.50', 0)
            print(socket.create_connection(('203.0.113.7', 443), 3, source_address=forged).recv(99))
        except OSError as error:
            print(type(error).__name__)
        fcntl.ioctl(probe, 0x8914, struct.pack('16sH22x', b'eth0:1', 0))
        """
    )
    assert said.strip() == "TimeoutError"
    assert world.value("reach('203.0.113.7', 443)") == "203.0.113.7 443"

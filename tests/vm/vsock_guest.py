"""What runs in the guest of test_vsock_device.py instead of the agent: a few servers on vsock ports."""

import hashlib
import socket
import threading

ECHO, SINK, CLOSER = 1, 2, 3
READY = "VSOCK-GUEST-READY"


def echo(stream: socket.socket) -> None:
    """Sends back what comes, passes the half-close back."""
    while data := stream.recv(65536):
        stream.sendall(data)
    stream.close()


def sink(stream: socket.socket) -> None:
    """Takes everything until the half-close, then answers with its digest."""
    digest = hashlib.sha256()
    while data := stream.recv(262144):
        digest.update(data)
    stream.sendall(digest.digest())
    stream.close()


def closer(stream: socket.socket) -> None:
    """Half-closes first, then sends nothing and waits for the host's end."""
    stream.sendall(b"goodbye")
    stream.shutdown(socket.SHUT_WR)
    total = 0
    while data := stream.recv(65536):
        total += len(data)
    print("CLOSER", total, flush=True)
    stream.close()


def serve(port: int, handler) -> None:
    """Accepts for ever, a thread for each stream."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(64)

    def accept() -> None:
        while True:
            stream, _ = listener.accept()
            threading.Thread(target=handler, args=(stream,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


if __name__ == "__main__":
    serve(ECHO, echo)
    serve(SINK, sink)
    serve(CLOSER, closer)
    print(READY, flush=True)
    threading.Event().wait()

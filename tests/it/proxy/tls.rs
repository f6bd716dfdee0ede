//! The names of TLS: what may be asked for passes verbatim, what may not gets an alert.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Result;
use weir::model::l7::{L7Message, L7Rules, L7Verdict};

use super::world::{SERVER, World, by_one, set};

/// A server of TLS with a certificate of its own; `openssl s_server` answers with what it has negotiated.
fn serve(world: &World) -> Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    command.args(["-subj", "/CN=test", "-days", "1", "-keyout", &path("key"), "-out", &path("cert")]);
    world.server.command(command, "")?;
    let mut server = Command::new("openssl");
    server.args([
        "s_server",
        "-quiet",
        "-www",
        "-accept",
        "443",
        "-key",
        &path("key"),
        "-cert",
        &path("cert"),
    ]);
    let child = world.server.run(move || server.spawn())?;
    super::world::wait("the server of TLS", || {
        let tried = world.server.run(|| std::net::TcpStream::connect((SERVER[0], 443)));
        tried.is_ok().then_some(())
    })?;
    CHILDREN.lock().expect("no panic inside").push(child);
    Ok(directory)
}

static CHILDREN: std::sync::Mutex<Vec<std::process::Child>> = std::sync::Mutex::new(Vec::new());

struct Ends;

impl Drop for Ends {
    fn drop(&mut self) {
        for mut child in CHILDREN.lock().expect("no panic inside").drain(..) {
            let _ = (child.kill(), child.wait());
        }
    }
}

#[test]
fn only_allowed_names_reach_the_server() -> Result<()> {
    let names = ["api.example.com", "*.shop.example.com"].map(str::to_owned).to_vec();
    let world = World::start(&[set(1, L7Rules::ServerNames(names))], by_one)?;
    let _ends = Ends;
    let _directory = serve(&world)?;
    let ask = |name: &[&str], versions: &[&str]| {
        let mut command = Command::new("openssl");
        command
            .args(["s_client", "-connect", "10.78.0.2:443", "-quiet", "-no_ign_eof"])
            .args(name)
            .args(versions);
        world.client.command(command, "GET / HTTP/1.0\r\n\r\n").map_err(|error| error.to_string())
    };
    for version in ["-tls1_2", "-tls1_3"] {
        for name in ["api.example.com", "API.example.com", "a.shop.example.com"] {
            assert!(ask(&["-servername", name], &[version]).is_ok(), "{name} {version}");
        }
        for name in ["other.example.com", "shop.example.com", "a.b.shop.example.com"] {
            let refused = ask(&["-servername", name], &[version]).expect_err(name);
            assert!(refused.contains("access denied"), "{name} {version}: {refused}");
        }
        let refused = ask(&["-noservername"], &[version]).expect_err("no name");
        assert!(refused.contains("access denied"), "{refused}");
    }
    world.agent.record("the denial", |record| {
        let name = L7Message::Tls { server_name: Some("other.example.com".into()) };
        record.verdict == L7Verdict::Denied && record.message == name
    })?;
    // No TLS at all.
    let at: SocketAddr = SocketAddr::new(SERVER[0].parse()?, 443);
    assert!(world.send(at, b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")?.is_empty());
    Ok(())
}

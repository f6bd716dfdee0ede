//! HTTP/2 by prior knowledge, and gRPC.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, HeaderValue, Request, Response};
use weir::model::l7::{HttpRule, L7Message, L7Rules, L7Verdict, RecordKind};

use crate::lab::Space;

use super::world::{SERVER, World, by_one, http, set};

/// A server of HTTP/2: it answers with the method and the path, sends the body back, and trailers behind it.
fn serve(space: &Space, port: u16) -> Result<()> {
    let listener = space.run(move || {
        let listener = TcpListener::bind((SERVER[0], port))?;
        listener.set_nonblocking(true)?;
        anyhow::Ok(listener)
    })?;
    space.start(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(echo(request, respond));
                    }
                });
            }
            #[allow(unreachable_code)]
            anyhow::Ok(())
        })
    });
    Ok(())
}

async fn echo(request: Request<RecvStream>, mut respond: h2::server::SendResponse<Bytes>) {
    let (parts, mut body) = request.into_parts();
    let is_grpc = parts.headers.contains_key("te");
    let kind = if is_grpc { "application/grpc" } else { "text/plain" };
    let response = Response::builder().header("content-type", kind).header("x-path", parts.uri.path());
    let Ok(mut stream) = respond.send_response(response.body(()).expect("a response"), false) else { return };
    let head = format!("{} {}\n", parts.method, parts.uri.path());
    if !is_grpc {
        let _ = stream.send_data(head.into(), false);
    }
    while let Some(Ok(data)) = body.data().await {
        let _ = body.flow_control().release_capacity(data.len());
        stream.reserve_capacity(data.len());
        let mut data = data;
        while !data.is_empty() {
            let Some(Ok(room)) = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await else { return };
            let part = data.split_to(room.min(data.len()));
            let _ = stream.send_data(part, false);
        }
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let _ = stream.send_trailers(trailers);
}

#[test]
fn streams_are_judged_one_by_one() -> Result<()> {
    let world = World::start(&[set(1, http(&[("GET|POST", "/ok.*")]))], by_one)?;
    serve(&world.server, 80)?;
    let curl = |arguments: &[&str]| world.curl(&[&["--http2-prior-knowledge"], arguments].concat());
    assert_eq!(curl(&["http://10.78.0.2/ok"])?, "GET /ok\n");
    assert_eq!(curl(&["http://10.78.0.2/no"])?, "Access denied\r\n");
    assert_eq!(curl(&["--path-as-is", "http://10.78.0.2/ok/../no"])?, "Access denied\r\n");
    // curl 7.88 cannot use such a connection twice, with or without a proxy: gRPC's test does.
    let data = "x".repeat(5_000_000);
    let mut command = std::process::Command::new("curl");
    command.args(["--silent", "--max-time", "20", "--http2-prior-knowledge", "--data-binary", "@-"]);
    command.arg("http://10.78.0.2/ok");
    let echoed = world.client.command(command, &data)?;
    assert_eq!(echoed.len(), "POST /ok\n".len() + data.len());
    let answer = world.agent.record("the answer", |record| {
        record.kind == RecordKind::Response && record.verdict == L7Verdict::Forwarded
    })?;
    let L7Message::Http(said) = &answer.message else { panic!("{answer:?}") };
    assert_eq!((&*said.version, said.status), ("HTTP/2", Some(200)));
    Ok(())
}

/// Calls of gRPC by the h2 crate, in one connection from the client's namespace.
async fn call(
    server: &mut h2::client::SendRequest<Bytes>,
    path: &str,
    messages: &[&'static str],
) -> Result<(u16, Option<String>, Vec<u8>)> {
    let request = Request::post(format!("http://10.78.0.2{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    *server = server.clone().ready().await?;
    let (response, mut stream) = server.send_request(request, false)?;
    for message in messages {
        stream.send_data(Bytes::from_static(message.as_bytes()), false)?;
    }
    stream.send_data(Bytes::new(), true)?;
    let response = response.await?;
    let status = response.status().as_u16();
    let text = |headers: &HeaderMap| {
        headers.get("grpc-status").and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let at_once = text(response.headers());
    let mut body = response.into_body();
    let mut received = Vec::new();
    while let Some(data) = body.data().await {
        received.extend_from_slice(&data?);
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    Ok((status, at_once.or(text(&trailers)), received))
}

#[test]
fn a_denied_call_of_grpc_has_no_permission() -> Result<()> {
    let rule = HttpRule {
        method: Some("POST".into()),
        path: Some(r"/shop\.Orders/(Get|List).*".into()),
        ..HttpRule::default()
    };
    let world = World::start(&[set(1, L7Rules::Http(vec![rule]))], by_one)?;
    serve(&world.server, 80)?;
    world.client.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let address = SocketAddr::new(SERVER[0].parse()?, 80);
            let stream = tokio::net::TcpStream::connect(address).await?;
            let (mut server, connection) = h2::client::handshake(stream).await?;
            tokio::spawn(connection);
            let within = Duration::from_secs(20);
            for (path, expected) in [
                ("/shop.Orders/Get", (200, Some("0".to_owned()), b"onetwo".to_vec())),
                ("/shop.Orders/Delete", (200, Some("7".to_owned()), Vec::new())),
                ("/shopXOrders/Get", (200, Some("7".to_owned()), Vec::new())),
                ("/shop.Orders/List", (200, Some("0".to_owned()), b"onetwo".to_vec())),
            ] {
                let called = tokio::time::timeout(within, call(&mut server, path, &["one", "two"]));
                let said = called.await.with_context(|| format!("no answer to {path}"))??;
                assert_eq!(said, expected, "{path}");
            }
            anyhow::Ok(())
        })
    })?;
    let denied = world.agent.record("the denial", |record| record.verdict == L7Verdict::Denied)?;
    let L7Message::Http(said) = &denied.message else { panic!("{denied:?}") };
    assert_eq!(said.grpc_status, Some(7));
    let answer = world.agent.record("the answer", |record| record.kind == RecordKind::Response)?;
    let L7Message::Http(said) = &answer.message else { panic!("{answer:?}") };
    assert_eq!(said.grpc_status, Some(0));
    Ok(())
}

//! Connections that carry as much as goes, and what arrives by them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::pod::{PORTS, Pod};
use super::space::Running;

/// So long the connections have to fill the queues before anything is measured.
const WARM_UP: Duration = Duration::from_millis(700);

/// Connections that carry as much as goes, once they may begin.
pub struct Streams {
    received: Arc<AtomicU64>,
    begins: Arc<AtomicBool>,
    stops: Arc<AtomicBool>,
    senders: Vec<Running<Result<()>>>,
    accepted: Vec<TcpStream>,
}

impl Streams {
    /// Connects so many times, and sends nothing yet.
    pub fn connect(from: &Pod, to: &Pod, count: usize, port: u16) -> Result<Self> {
        let target = SocketAddr::new(to.address(true), port);
        let listener = to.space().run(move || TcpListener::bind(target))?;
        let (begins, stops) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let send = || {
            let (begins, stops) = (begins.clone(), stops.clone());
            from.space().start(move || -> Result<()> {
                let (mut stream, part) = (TcpStream::connect(target)?, vec![0; 16384]);
                while !begins.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                stream.set_write_timeout(Some(Duration::from_millis(100)))?;
                while !stops.load(Ordering::Relaxed) {
                    match stream.write(&part) {
                        Err(error) if error.kind() != ErrorKind::WouldBlock => break,
                        _ => {}
                    }
                }
                Ok(())
            })
        };
        let senders = (0..count).map(|_| send()).collect();
        let received = Arc::new(AtomicU64::new(0));
        let accepted = to.space().run({
            let received = received.clone();
            move || -> Result<Vec<TcpStream>> {
                let accept = || -> Result<TcpStream> {
                    let stream = listener.accept()?.0;
                    let (mut reading, received) = (stream.try_clone()?, received.clone());
                    std::thread::spawn(move || {
                        let mut buffer = vec![0; 65536];
                        while let Ok(length @ 1..) = reading.read(&mut buffer) {
                            received.fetch_add(length as u64, Ordering::Relaxed);
                        }
                    });
                    Ok(stream)
                };
                (0..count).map(|_| accept()).collect()
            }
        })?;
        Ok(Self { received, begins, stops, senders, accepted })
    }

    /// Lets them send, and fills the queues.
    pub fn begin(&self) {
        self.begins.store(true, Ordering::Relaxed);
        std::thread::sleep(WARM_UP);
    }

    /// Bits a second of payload that arrive by each of these within `time`, while all of them send.
    pub fn measure(all: Vec<Streams>, time: Duration) -> Result<Vec<f64>> {
        all.iter().for_each(|streams| streams.begins.store(true, Ordering::Relaxed));
        std::thread::sleep(WARM_UP);
        let (began, before): (_, Vec<f64>) = (Instant::now(), all.iter().map(Streams::bits).collect());
        std::thread::sleep(time);
        let after: Vec<f64> = all.iter().map(Streams::bits).collect();
        let seconds = began.elapsed().as_secs_f64();
        all.into_iter().try_for_each(Streams::stop)?;
        Ok(after.iter().zip(before).map(|(after, before)| (after - before) / seconds).collect())
    }

    fn bits(&self) -> f64 {
        self.received.load(Ordering::Relaxed) as f64 * 8.0
    }

    /// Ends them.
    pub fn stop(self) -> Result<()> {
        self.stops.store(true, Ordering::Relaxed);
        for stream in &self.accepted {
            stream.shutdown(Shutdown::Both)?;
        }
        drop(self.accepted);
        self.senders.into_iter().try_for_each(|sender| sender.wait())
    }
}

/// The median time that a message and its echo need.
pub fn round_trip(from: &Pod, to: &Pod) -> Result<Duration> {
    let target = SocketAddr::new(to.address(true), PORTS[0]);
    from.space().run(move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        socket.connect(target)?;
        let mut times = Vec::new();
        for _ in 0..100 {
            let (began, mut answer) = (Instant::now(), [0; 256]);
            socket.send(b"x")?;
            socket.recv(&mut answer)?;
            times.push(began.elapsed());
        }
        times.sort();
        Ok(times[times.len() / 2])
    })
}

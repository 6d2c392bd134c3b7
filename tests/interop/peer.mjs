// A js-libp2p peer of a RiOS swarm. Takes one JSON command a line on stdin, answers on stdout. Not a test by itself.

import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { privateKeyFromRaw } from '@libp2p/crypto/keys'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { CID } from 'multiformats/cid'
import * as raw from 'multiformats/codecs/raw'
import * as Digest from 'multiformats/hashes/digest'
import { openAdvert, openHeartbeat, signAdvert } from './advert.mjs'
import { modelKey, shardKey } from './directory.mjs'
import { Identity } from './identity.mjs'
import { BULK, Lane, MAIN } from './lane.mjs'
import { Rpc } from './rpc.mjs'

const RPC_PROTOCOL = '/rios/rpc/1.0.0'
const ADVERT_TOPIC = 'rios/advert/1'
const BEAT_TOPIC = 'rios/heartbeat/1'
const WAIT_MS = 20_000

const identity = new Identity(Buffer.from(process.argv[2], 'hex'))
const heard = new Map()
const loads = new Map()
const lanes = new Map()
const taken = new Map()
const rpcs = new Map()
let own = signOwn()

const node = await createLibp2p({
  privateKey: privateKeyFromRaw(Buffer.concat([Buffer.from(process.argv[2], 'hex'), identity.publicKey])),
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    ping: ping(),
    dht: kadDHT({
      protocol: '/ipfs/kad/1.0.0',
      clientMode: false,
      peerInfoMapper: passthroughMapper,
      allowQueryWithZeroPeers: true,
      validators: { rios: checkRecord },
      selectors: { rios: selectRecord }
    }),
    pubsub: gossipsub({ allowPublishToZeroTopicPeers: true, emitSelf: false })
  }
})

function signOwn (fields = {}) {
  const now = BigInt(Date.now())
  return signAdvert(identity, { seq: now, expires_ms: now + 60_000n, ...fields })
}

async function checkRecord (key, value) {
  const [, , namespace, name] = Buffer.from(key).toString().split('/')
  if (namespace !== 'node' || openAdvert(value, Date.now()).peer_id !== name) throw new Error(`a wrong record for ${name}`)
}

function selectRecord (key, values) {
  let best = 0
  values.forEach((value, index) => {
    if (openAdvert(value, Date.now()).seq > openAdvert(values[best], Date.now()).seq) best = index
  })
  return best
}

// -- our side of the methods that a peer must serve, and one for the test

const handlers = {
  'advert.exchange': (header, buffers) => {
    takeAll(buffers)
    const known = header.known ?? {}
    const give = known[identity.peerId] === undefined ? [own] : []
    const want = Object.keys(known).filter(peer => !taken.has(peer) && peer !== identity.peerId)
    return { header: { want }, buffers: give }
  },
  'advert.push': (header, buffers) => {
    takeAll(buffers)
    return { header: {}, buffers: [] }
  },
  echo: (header, buffers) => ({ header: { ...header, from: 'javascript' }, buffers })
}

function takeAll (buffers) {
  for (const data of buffers) {
    const advert = openAdvert(data, Date.now())
    taken.set(advert.peer_id, advert)
  }
}

node.services.pubsub.addEventListener('message', ({ detail }) => {
  if (detail.topic === ADVERT_TOPIC) heard.set(openAdvert(detail.data, Date.now()).peer_id, detail.from.toString())
  if (detail.topic === BEAT_TOPIC) loads.set(detail.from.toString(), openHeartbeat(detail.data, Date.now()).load)
})
node.services.pubsub.subscribe(ADVERT_TOPIC)
node.services.pubsub.subscribe(BEAT_TOPIC)

function attach (stream) {
  const rpc = new Rpc({ send: bytes => stream.send(bytes), close: () => stream.abort(new Error('protocol')) }, handlers)
  stream.addEventListener('message', event => rpc.received(Buffer.from(event.data.subarray())))
  stream.addEventListener('close', event => rpc.end(event.error?.name ?? 'closed'))
  stream.addEventListener('remoteCloseWrite', () => rpc.end('closed'))
  return rpc
}

await node.handle(RPC_PROTOCOL, attach)

async function rpcTo (peer) {
  if (!rpcs.has(peer)) {
    const rpc = attach(await node.dialProtocol(peerIdFromString(peer), RPC_PROTOCOL))
    rpcs.set(peer, rpc)
    rpc.ended.then(() => rpcs.delete(peer))
  }
  return rpcs.get(peer)
}

// -- commands

async function until (condition) {
  const end = Date.now() + WAIT_MS
  while (Date.now() < end) {
    const value = await condition()
    if (value) return value
    await new Promise(resolve => setTimeout(resolve, 50))
  }
  return null
}

async function values (events, pick) {
  const found = []
  for await (const event of events) found.push(...pick(event))
  return found
}

const cidOf = ({ model, shard }) => CID.createV1(raw.code, Digest.decode(shard === undefined ? modelKey(model) : shardKey(model, shard)))

const commands = {
  dial: async ({ address }) => {
    const connection = await node.dial(multiaddr(address))
    return { peer: connection.remotePeer.toString(), encryption: connection.encryption, multiplexer: connection.multiplexer }
  },
  speaks: async ({ peer, protocols }) => ({
    all: await until(async () => {
      const known = (await node.peerStore.get(peerIdFromString(peer))).protocols
      return protocols.every(protocol => known.includes(protocol))
    })
  }),
  ping: async ({ peer }) => ({ ms: await node.services.ping.ping(peerIdFromString(peer)) }),
  rpc: async ({ peer, method, header, buffers, deadline_ms: deadlineMs }) => {
    return await (await rpcTo(peer)).call(method, header, buffers.map(hex => Buffer.from(hex, 'hex')), deadlineMs)
  },
  rpc_stream: async ({ peer, method, header, deadline_ms: deadlineMs }) => {
    const { items, end } = await (await rpcTo(peer)).stream(method, header, deadlineMs)
    return { numbers: items.map(item => item.header.n), bytes: items.reduce((sum, item) => sum + item.buffers[0].length, 0), end }
  },
  rpc_ping: async ({ peer, number }) => await (await rpcTo(peer)).ping(number),
  nonsense: async ({ peer, bytes }) => {
    const rpc = attach(await node.dialProtocol(peerIdFromString(peer), RPC_PROTOCOL))
    rpc.carrier.send(Buffer.from(bytes, 'hex'))
    const late = new Promise(resolve => setTimeout(resolve, WAIT_MS, null).unref())
    return { ended: await Promise.race([rpc.ended, late]) }
  },
  find: async ({ peer, model, shard }) => ({
    adverts: await until(async () => {
      const { buffers } = await (await rpcTo(peer)).call('advert.find', { model, shard }, [], 5000)
      return buffers.length ? buffers.map(data => openAdvert(data, Date.now())) : null
    })
  }),
  dht_advert: async ({ peer }) => ({
    advert: await until(async () => {
      const key = Buffer.from(`/rios/node/${peer}`)
      const found = await values(node.services.dht.get(key), event => event.name === 'VALUE' ? [event.value] : [])
      return found.length ? openAdvert(found.at(-1), Date.now()) : null
    })
  }),
  dht_providers: async key => ({
    providers: await until(async () => {
      const pick = event => event.name === 'PROVIDER' ? event.providers.map(provider => provider.id.toString()) : []
      const found = await values(node.services.dht.findProviders(cidOf(key)), pick)
      return found.length ? [...new Set(found)] : null
    })
  }),
  dht_provide: async key => {
    const pick = event => event.name === 'PEER_RESPONSE' && event.messageName === 'ADD_PROVIDER' ? [event.from.toString()] : []
    return { stored_at: await values(node.services.dht.provide(cidOf(key)), pick) }
  },
  dht_put_own: async () => {
    const pick = event => event.name === 'PEER_RESPONSE' && event.messageName === 'PUT_VALUE' ? [event.from.toString()] : []
    return { stored_at: await values(node.services.dht.put(Buffer.from(`/rios/node/${identity.peerId}`), own), pick) }
  },
  taken: async ({ peer }) => ({ advert: await until(() => taken.get(peer)) }),
  heard: async ({ peer }) => ({ sender: await until(() => heard.get(peer)) }),
  lane: async ({ name, peer, address, aes, psk }) => {
    const [, , host, , port] = address.split('/')
    const lane = await Lane.dial({ host, port, identity, peerId: peer, aes, psk: psk && Buffer.from(psk, 'hex') })
    const channels = [MAIN, BULK].map(number => {
      const rpc = new Rpc(lane.channel(number, bytes => rpc.received(bytes)), handlers)
      lane.ended.then(rpc.end)
      return rpc
    })
    lanes.set(name, { lane, channels })
    lane.run()
    return { cipher: lane.cipher }
  },
  lane_rpc: async ({ name, bulk, method, header, buffers, deadline_ms: deadlineMs }) => {
    const rpc = lanes.get(name).channels[bulk ? BULK : MAIN]
    return await rpc.call(method, header, buffers.map(hex => Buffer.from(hex, 'hex')), deadlineMs)
  },
  lane_record: async ({ name, kind, bytes, wait_ms: waitMs = WAIT_MS }) => {
    const { lane } = lanes.get(name)
    lane.record(kind, Buffer.from(bytes, 'hex'))
    const late = new Promise(resolve => setTimeout(resolve, waitMs, null).unref())
    return { ended: await Promise.race([lane.ended, late]) }
  },
  load: async ({ peer }) => ({ load: await until(() => loads.get(peer)) }),
  publish: async ({ region, announce }) => {
    own = signOwn({ region, addresses: announce ? node.getMultiaddrs().map(String) : [] })
    await until(() => node.services.pubsub.getSubscribers(ADVERT_TOPIC).length > 0)
    const { recipients } = await node.services.pubsub.publish(ADVERT_TOPIC, own)
    return { recipients: recipients.map(String) }
  }
}

function plain (key, value) {
  if (typeof value === 'bigint') return Number(value)
  if (value?.type === 'Buffer') return { hex: Buffer.from(value.data).toString('hex') }
  if (value instanceof Uint8Array) return { hex: Buffer.from(value).toString('hex') }
  return value
}

const say = value => process.stdout.write(JSON.stringify(value, plain) + '\n')

say({ peer_id: node.peerId.toString(), address: node.getMultiaddrs()[0].toString(), node: process.version })
for await (const line of createInterface({ input: process.stdin })) {
  const { op, ...more } = JSON.parse(line)
  try {
    say(await commands[op](more))
  } catch (error) {
    say({ failed: `${error.name}: ${error.message}` })
  }
}
await node.stop()
process.exit(0)

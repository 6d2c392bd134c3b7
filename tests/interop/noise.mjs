// Noise XX and XXpsk0 (25519, ChaChaPoly, SHA256), revision 34 of the Noise specification, with node:crypto only.

import { createCipheriv, createDecipheriv, createHash, createHmac, createPrivateKey, createPublicKey, diffieHellman, generateKeyPairSync } from 'node:crypto'

const KEY_PREFIX = Buffer.from('302a300506032b656e032100', 'hex') // SubjectPublicKeyInfo of X25519, RFC 8410
const SECRET_PREFIX = Buffer.from('302e020100300506032b656e04220420', 'hex') // PKCS #8
const TAG_BYTES = 16
export const CHACHA = 'chacha20-poly1305'
export const AES = 'aes-256-gcm'

export function seal (cipher, key, nonce, plain, additional) {
  const sealing = createCipheriv(cipher, key, nonce, { authTagLength: TAG_BYTES })
  sealing.setAAD(additional, { plaintextLength: plain.length })
  return Buffer.concat([sealing.update(plain), sealing.final(), sealing.getAuthTag()])
}

export function open (cipher, key, nonce, sealed, additional) {
  const opening = createDecipheriv(cipher, key, nonce, { authTagLength: TAG_BYTES })
  opening.setAAD(additional, { plaintextLength: sealed.length - TAG_BYTES })
  opening.setAuthTag(sealed.subarray(sealed.length - TAG_BYTES))
  return Buffer.concat([opening.update(sealed.subarray(0, sealed.length - TAG_BYTES)), opening.final()])
}

export function nonceOf (number) {
  const nonce = Buffer.alloc(12)
  nonce.writeBigUInt64LE(BigInt(number), 4)
  return nonce
}

// the key that follows a key, by Noise's rekey
const REKEY_NONCE = Buffer.concat([Buffer.alloc(11, 0xff), Buffer.from([0xfe])])
export const nextKey = (cipher, key) => seal(cipher, key, REKEY_NONCE, Buffer.alloc(32), Buffer.from('rekey')).subarray(0, 32)

export class KeyPair {
  constructor (secret) {
    this.secret = secret === undefined
      ? generateKeyPairSync('x25519').privateKey
      : createPrivateKey({ key: Buffer.concat([SECRET_PREFIX, secret]), format: 'der', type: 'pkcs8' })
    this.public = createPublicKey(this.secret).export({ format: 'der', type: 'spki' }).subarray(-32)
  }

  agree (publicKey) {
    const key = createPublicKey({ key: Buffer.concat([KEY_PREFIX, publicKey]), format: 'der', type: 'spki' })
    return diffieHellman({ privateKey: this.secret, publicKey: key })
  }
}

const sha256 = (...parts) => parts.reduce((hash, part) => hash.update(part), createHash('sha256')).digest()
const hmac = (key, ...parts) => parts.reduce((mac, part) => mac.update(part), createHmac('sha256', key)).digest()

function derive (chain, input) {
  const temporary = hmac(chain, input)
  const first = hmac(temporary, Buffer.from([1]))
  const second = hmac(temporary, first, Buffer.from([2]))
  return [first, second, hmac(temporary, second, Buffer.from([3]))]
}

// One side of a handshake: write() and read() in turn, three messages in all, then split().
export class Handshake {
  constructor ({ initiator, prologue, psk, statics, ephemerals }) {
    const name = Buffer.from(psk ? 'Noise_XXpsk0_25519_ChaChaPoly_SHA256' : 'Noise_XX_25519_ChaChaPoly_SHA256')
    this.hash = name.length > 32 ? sha256(name) : name
    this.chain = this.hash
    this.key = undefined
    this.number = 0
    this.initiator = initiator
    this.psk = psk
    this.statics = statics
    this.ephemerals = ephemerals
    this.tokens = [psk ? ['psk', 'e'] : ['e'], ['e', 'ee', 's', 'es'], ['s', 'se']]
    this.#mixHash(prologue)
  }

  write (payload) {
    const parts = this.tokens.shift().map(token => {
      if (token === 'e') return this.#ephemeral(this.ephemerals.public)
      if (token === 's') return this.#sealAndHash(this.statics.public)
      this.#mix(token)
      return Buffer.alloc(0)
    })
    return Buffer.concat([...parts, this.#sealAndHash(payload)])
  }

  read (message) {
    let at = 0
    const take = count => message.subarray(at, at += count)
    for (const token of this.tokens.shift()) {
      if (token === 'e') this.remoteEphemeral = this.#ephemeral(take(32))
      else if (token === 's') this.remoteStatic = this.#openAndHash(take(this.key ? 32 + TAG_BYTES : 32))
      else this.#mix(token)
    }
    return this.#openAndHash(message.subarray(at))
  }

  // the keys of what the initiator sends and of what the responder sends
  split () {
    return derive(this.chain, Buffer.alloc(0)).slice(0, 2)
  }

  #mixHash (data) {
    this.hash = sha256(this.hash, data)
  }

  #mixKey (input) {
    [this.chain, this.key] = derive(this.chain, input)
    this.number = 0
  }

  #ephemeral (publicKey) {
    this.#mixHash(publicKey)
    if (this.psk) this.#mixKey(publicKey)
    return publicKey
  }

  #mix (token) {
    if (token === 'psk') {
      let middle
      ;[this.chain, middle, this.key] = derive(this.chain, this.psk)
      this.number = 0
      this.#mixHash(middle)
      return
    }
    // the first letter is the initiator's key, the second the responder's
    const [own, remote] = this.initiator ? token : [token[1], token[0]]
    const pair = own === 'e' ? this.ephemerals : this.statics
    this.#mixKey(pair.agree(remote === 'e' ? this.remoteEphemeral : this.remoteStatic))
  }

  #sealAndHash (plain) {
    const data = this.key ? seal(CHACHA, this.key, nonceOf(this.number++), plain, this.hash) : plain
    this.#mixHash(data)
    return data
  }

  #openAndHash (data) {
    const plain = this.key ? open(CHACHA, this.key, nonceOf(this.number++), data, this.hash) : data
    this.#mixHash(data)
    return plain
  }
}
